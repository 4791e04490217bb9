"""CPU time of reading some frames of a long clip, beside the plain ways to do it; then of a loader fed by it.

    python -m tests.benchmarks.decode --out runs/decode
    python -m tests.benchmarks.decode --out runs/decode --seconds 10 --gop 25 --rounds 5

Every way runs in this process with one decoder thread; a round runs all of them in turn. Clips that are there are not
made again. CPU time is the process's, so that of other processes does not count, though it may slow this one down.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import av
import numpy as np

from data.dataset import ClipDataset, ClipLoader, StepBatches
from data.decode import _to_rgb, pick
from data.labels import Clip
from data.samplers import UniformSampler

FRAMES = 12
FPS = 25
BITS_PER_SECOND = 4_000_000
SIDE = 448


def clip(out: Path, seconds: int, gop: int, size: tuple[int, int]) -> Path:
    """A camera that sways over a smooth texture, with the noise of a sensor."""
    width, height = size
    path = out / f"{width}x{height}-{seconds}s-gop{gop}.mp4"
    if path.exists():
        return path
    random = np.random.default_rng(0)
    coarse = av.VideoFrame.from_ndarray(random.integers(0, 256, (height // 8, width // 8), np.uint8), format="gray")
    texture = coarse.reformat(2 * width, 2 * height, interpolation="BICUBIC").to_ndarray() // 2 + 50
    noise = random.integers(0, 9, (8, height * 3 // 2, width), np.uint8)
    partial = path.with_suffix(".partial.mp4")
    with av.open(str(partial), "w") as container:
        stream = container.add_stream("libx264", rate=FPS)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = width, height, "yuv420p", BITS_PER_SECOND
        stream.options = {"g": str(gop), "preset": "veryfast", "x264-params": "scenecut=0"}
        for k in range(seconds * FPS):
            x, y = (int((1 + f(k / 40)) / 2 * side) for f, side in ((np.sin, width - 2), (np.cos, height - 2)))
            luma, chroma = texture[y : y + height, x : x + width], texture[y // 2 : (y + height) // 2, x : x + width]
            frame = av.VideoFrame.from_ndarray(np.concatenate([luma, chroma]) + noise[k % 8], format="yuv420p")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return partial.rename(path)


def choose(times_s: np.ndarray) -> np.ndarray:
    return UniformSampler(FRAMES)(len(times_s)).numpy()


def opened(path: Path) -> tuple[av.container.InputContainer, av.VideoStream]:
    container = av.open(str(path))
    container.streams.video[0].codec_context.thread_count = 1
    return container, container.streams.video[0]


def shown_at(path: Path) -> list[int]:
    with av.open(str(path)) as container:
        return sorted(packet.pts for packet in container.demux(video=0) if packet.size)


def convert_all(path: Path) -> list[np.ndarray]:
    """Decode and convert everything, as a reader that gives an array per picture does."""
    wanted = set(choose(np.array(shown_at(path))).tolist())
    container, stream = opened(path)
    with container:
        pictures = ((k, _to_rgb(frame)) for k, frame in enumerate(container.decode(stream)))
        return [picture for k, picture in pictures if k in wanted]


def decode_all(path: Path) -> list[np.ndarray]:
    """Decode everything, convert what is wanted."""
    wanted = set(choose(np.array(shown_at(path))).tolist())
    container, stream = opened(path)
    with container:
        return [_to_rgb(frame) for k, frame in enumerate(container.decode(stream)) if k in wanted]


def seek_each(path: Path) -> list[np.ndarray]:
    """For every frame, seek to the keyframe before it and decode up to it."""
    times = shown_at(path)
    container, stream = opened(path)
    pictures = []
    with container:
        for k in choose(np.array(times)):
            container.seek(times[k], stream=stream)
            pictures.append(next(_to_rgb(frame) for frame in container.decode(stream) if frame.pts == times[k]))
    return pictures


def ours(path: Path) -> list[np.ndarray]:
    picked = pick(str(path), choose)
    return [picked.pictures[k] for k in picked.index]


WAYS = {
    "decode and convert all": convert_all,
    f"decode all, convert {FRAMES}": decode_all,
    "seek for every frame": seek_each,
    "data.decode.pick": ours,
}


def cpu_s(path: Path, rounds: int) -> dict[str, float]:
    """Median CPU seconds of each way. All must give the same pictures, bit by bit."""
    expected, taken = decode_all(path), {name: [] for name in WAYS}
    for _ in range(rounds):
        for name, way in WAYS.items():
            start = time.process_time()
            pictures = way(path)
            taken[name].append(time.process_time() - start)
            assert len(pictures) == FRAMES and all(map(np.array_equal, pictures, expected)), name
    return {name: median(seconds) for name, seconds in taken.items()}


def peak_mib() -> float:
    """Of this program; getrusage would count the process that started it, too. Needs Linux."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def extra_memory_mib(path: Path) -> float:
    """Peak memory of reading a clip with `pick` above that of the imports, in a process of its own."""
    code = f"from tests.benchmarks.decode import print_memory; print_memory({str(path)!r})"
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def print_memory(path: str) -> None:
    before = peak_mib()
    pick(path, choose)
    print(peak_mib() - before)


def waits_s(path: Path, steps: int, workers: int, pause_s: float) -> list[float]:
    """How long a consumer that works `pause_s` on each video waits for the next; the first, the start, left out."""
    clips = [Clip(path.name, 3, (1, 5), "benchmark", "train")] * steps
    dataset = ClipDataset(clips, path.parent, UniformSampler(FRAMES), SIDE, timeout_s=60)
    batches = iter(ClipLoader(dataset, StepBatches(steps, 1, 0, steps), num_workers=workers))
    next(batches)
    waits = []
    for _ in range(steps - 1):
        time.sleep(pause_s)
        start = time.perf_counter()
        next(batches)
        waits.append(time.perf_counter() - start)
    return waits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/decode"), help="folder of the clips")
    parser.add_argument("--seconds", type=int, nargs="+", default=[10, 60], help="lengths of the clips")
    parser.add_argument("--gop", type=int, default=250, help="pictures from one keyframe to the next")
    parser.add_argument("--size", type=int, nargs=2, default=[1920, 1080])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2, help="of the loader")
    parser.add_argument("--steps", type=int, default=40, help="videos that the loader is asked for")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    paths = [clip(args.out, seconds, args.gop, tuple(args.size)) for seconds in args.seconds]

    print("| clip | way | CPU s | of ours |\n|---|---|---|---|")
    for path in paths:
        taken = cpu_s(path, args.rounds)
        for name, seconds in taken.items():
            print(f"| {path.stem} | {name} | {seconds:.2f} | {seconds / taken['data.decode.pick']:.2f} |", flush=True)
    for path in paths:
        mbit = path.stat().st_size * 8 / 1e6
        print(f"{path.stem}: {mbit:.0f} Mbit, peak memory of pick {extra_memory_mib(path):.0f} MiB above its imports")

    for path in paths:
        waits = waits_s(path, args.steps, args.workers, pause_s=0.5)
        late = sum(wait > 0.01 for wait in waits)
        print(f"{path.stem}: loader, {args.workers} workers, 2 videos a second asked for: ", end="")
        print(f"{late} of {len(waits)} steps waited, {max(waits):.2f} s at most; ", end="")
        print(f"without a pause {len(waits) / sum(waits_s(path, args.steps, args.workers, 0)):.1f} videos a second")


if __name__ == "__main__":
    main()
