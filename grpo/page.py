"""HTML pages that need nothing but themselves: templates of grpo/pages filled in, pictures as data: URIs.

Everything filled in is escaped; what a model or a file name says cannot become markup. A page has no script, and tells
the browser to run and to load none.
"""

import base64
from fractions import Fraction
from pathlib import Path

import av
import jinja2
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from grpo import charts
from grpo.tables import shown

SIDE = 160  # longest side of a thumbnail in pixels
QUANTIZER = "4"  # of its JPEG: 2 is the best, 31 the smallest


def write_page(file: Path, template: str, **values) -> int:
    """Fill in a template of grpo/pages, write it to `file` and return its size in bytes; all it names must be given."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "pages"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["shown"] = shown
    environment.globals |= {"charts": charts}
    page = environment.get_template(template).render(**values).encode(errors="replace")
    file.parent.mkdir(parents=True, exist_ok=True)
    return file.write_bytes(page)


def thumbnail(frame: Tensor) -> dict:
    """`width`, `height`, `bytes` and `uri` of a uint8 frame (3, H, W), made smaller if it is larger than SIDE."""
    height, width = frame.shape[-2:]
    scale = min(1.0, SIDE / max(height, width))
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    if size != (height, width):
        frame = interpolate(frame[None], size=size, mode="bicubic", antialias=True)[0]
    picture = jpeg(frame)
    uri = "data:image/jpeg;base64," + base64.b64encode(picture).decode()
    return {"width": size[1], "height": size[0], "bytes": len(picture), "uri": uri}


def jpeg(frame: Tensor) -> bytes:
    """A uint8 frame (3, H, W), RGB, as a JPEG file."""
    codec = av.CodecContext.create("mjpeg", "w")
    codec.height, codec.width = frame.shape[-2:]
    codec.pix_fmt, codec.time_base = "yuvj420p", Fraction(1)
    codec.options = {"qmin": QUANTIZER, "qmax": QUANTIZER}
    pixels = av.VideoFrame.from_ndarray(frame.permute(1, 2, 0).contiguous().cpu().numpy(), "rgb24")
    return b"".join(map(bytes, [*codec.encode(pixels.reformat(format=codec.pix_fmt)), *codec.encode()]))


def strip(frames: Tensor | None, most: int) -> dict:
    """Thumbnails of at most `most` of the frames uint8 (F, 3, H, W), evenly chosen, and `of`: how many there are."""
    if frames is None:
        return {"thumbnails": [], "of": 0}
    chosen = torch.linspace(0, len(frames) - 1, min(most, len(frames))).round().long()
    return {"thumbnails": [thumbnail(frame) for frame in frames[chosen]], "of": len(frames)}
