import pytest

from grpo.bad_videos import BadVideos, TooManyBadVideos
from grpo.runlog import JsonLines


def failure(index):
    return {"index": index, "path": f"{index}.mp4", "reason": "unreadable", "detail": "why"}


@pytest.fixture
def file(tmp_path):
    return JsonLines(tmp_path / "bad.jsonl", done=0)


def test_a_video_counts_once_and_is_written_once(file, tmp_path):
    rows = [failure(7)]  # as a resumed run has them
    bad = BadVideos(rows, file, allowed=0.5, listed=10)
    bad.add(3, [failure(1), failure(7)])
    bad.add(4, [failure(1)])
    bad.add(5, [failure(2)])
    assert len(bad) == 3 and [row["index"] for row in rows] == [7, 1, 2]
    file.flush()
    written = (tmp_path / "bad.jsonl").read_text()
    assert written == (
        '{"step": 3, "index": 1, "path": "1.mp4", "reason": "unreadable", "detail": "why"}\n'
        '{"step": 5, "index": 2, "path": "2.mp4", "reason": "unreadable", "detail": "why"}\n'
    )


@pytest.mark.parametrize(("allowed", "listed", "most"), [(0.01, 100, 1), (0.01, 99, 0), (0.0, 50, 0), (0.25, 10, 2)])
def test_as_many_as_allowed_and_no_more(file, allowed, listed, most):
    rows = []
    bad = BadVideos(rows, file, allowed, listed)
    bad.add(1, [failure(index) for index in range(most)])
    with pytest.raises(TooManyBadVideos, match=rf"^{most + 1} of {listed} training videos") as caught:
        bad.add(2, [failure(most)])
    for index in range(most + 1):
        assert f"\n  {index}.mp4: unreadable (why)\n" in str(caught.value)
    assert rows == []


def test_a_step_that_cannot_be_filled_stops_the_run_whatever_is_allowed(file):
    with pytest.raises(TooManyBadVideos, match=r"^1 of 10 training videos"):
        BadVideos([], file, allowed=1.0, listed=10).add(1, [failure(0)], stop=True)
