"""The training videos that a run could not read: counted, written down, and when they are too many, the end of it."""

from grpo.runlog import JsonLines


class TooManyBadVideos(Exception):
    """Its text lists the training videos that cannot be read."""


class BadVideos:
    """What could not be read so far, the same in every process: `rows` with `index`, `path`, `reason` and `detail`.

    `rows` belongs to the saved state of the run. `file` gets each row once, with its step. allowed: the share of the
    `listed` training videos that may be bad.
    """

    def __init__(self, rows: list[dict], file: JsonLines, allowed: float, listed: int):
        self.rows, self.file, self.allowed, self.listed = rows, file, allowed, listed

    def __len__(self) -> int:
        return len(self.rows)

    def add(self, step: int, failures: list[dict], stop: bool = False) -> None:
        """Count the failures of a step; a video that fails again counts once.

        Raises TooManyBadVideos if they are now more than allowed, or if `stop`: the step cannot be filled. It forgets
        them then, so that a run that is resumed tries them again: they may have been mended.
        """
        known = {row["index"] for row in self.rows}
        new = [row for row in failures if row["index"] not in known]
        self.file.write({"step": step, **row} for row in new)
        self.rows += new
        if stop or len(self.rows) > self.allowed * self.listed:
            message = self._message()
            self.rows.clear()
            raise TooManyBadVideos(message)

    def _message(self) -> str:
        files = "".join(f"  {row['path']}: {row['reason']} ({row['detail']})\n" for row in self.rows)
        return (
            f"{len(self.rows)} of {self.listed} training videos cannot be used:\n{files}"
            "mend them, or allow more with --max-bad-videos, and go on with --resume auto"
        )
