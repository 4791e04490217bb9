"""The ten benchmarks of the paper: the scale of each one's MOS, and how its file names tell the source clip."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Benchmark:
    """One data set.

    `mos_range`: the scale (low, high) of its MOS. `known_from`: what says so. `source`: a regular expression whose one
    group finds the source clip in a file name; None where every clip is a source of its own. `released_range`: the
    scale in the released test list, where that differs.
    """

    mos_range: tuple[float, float]
    known_from: str
    source: str | None = None
    released_range: tuple[float, float] | None = None

    def range_in(self, label_format: str) -> tuple[float, float]:
        """The scale of this benchmark's scores in a label file of one format."""
        return self.released_range if self.released_range and label_format == "released-test" else self.mos_range


# The publications themselves were not at hand. "not verified": the scores found fit the usual scale of 0 to 100, and no
# more is known. "secondary source": the documentation of VMAFx states the scale; it is wrong about LSVQ.
NOT_VERIFIED = "not verified"
SECONDARY = "secondary source"

# A pattern is given where several files are versions of one source. The games of LIVE-YT-Gaming and the categories of
# YouTube-UGC are no sources: every file there is a clip of its own.
BENCHMARKS = {
    "LSVQ-test": Benchmark((0.0, 100.0), NOT_VERIFIED),
    "LSVQ-1080p": Benchmark((0.0, 100.0), NOT_VERIFIED),
    # The released list holds 20 times the MOS.
    "KoNViD-1k": Benchmark((1.0, 5.0), SECONDARY, released_range=(20.0, 100.0)),
    "LIVE-VQC": Benchmark((0.0, 100.0), SECONDARY),
    "YouTube-UGC": Benchmark((1.0, 5.0), SECONDARY),
    "LIVE-YT-Gaming": Benchmark((0.0, 100.0), NOT_VERIFIED),
    # Its readme gives a 7-point continuous scale and no ends; a MOS of 6.06 rules out 0 to 6. The source is the game,
    # one of 15: Overwatch_2_30 and Overwatch_30_30fps are recordings of the same.
    "CGVDS": Benchmark((1.0, 7.0), "7 points by its readme, ends inferred", r"([^/_]+)_[^/]*_\d+x\d+_\d+_\d+_"),
    "LIVE-YT-HFR": Benchmark((0.0, 100.0), NOT_VERIFIED, r"([^/]+)_crf_\d+_\d+fps"),
    # The number of the source stands after the codec: HEVC_01_960x540_1.
    "Waterloo-IVC-4K": Benchmark((0.0, 100.0), SECONDARY, r"[^/_]+_(\d+)_\d+x\d+_\d+"),
    "VDPVE": Benchmark((0.0, 100.0), NOT_VERIFIED, r"([A-Z]\d+)_\d+"),
}
