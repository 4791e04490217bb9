"""HTML pages that need nothing but themselves: templates of grpo/pages filled in, pictures as data: URIs.

Everything filled in is escaped; what a model or a file name says cannot become markup. A page has no script, and tells
the browser to run and to load none.
"""

import base64
from pathlib import Path

import jinja2
import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.io import encode_jpeg

from grpo import charts
from grpo.tables import shown

SIDE = 160  # longest side of a thumbnail in pixels
QUALITY = 75  # of its JPEG


def render(template: str, **values) -> str:
    """The page of a template in grpo/pages; a name that it needs and is not given is an error."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "pages"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["shown"] = shown
    environment.globals |= {"charts": charts}
    return environment.get_template(template).render(**values)


def thumbnail(frame: Tensor) -> dict:
    """`width`, `height`, `bytes` and `uri` of a uint8 frame (3, H, W), made smaller if it is larger than SIDE."""
    height, width = frame.shape[-2:]
    scale = min(1.0, SIDE / max(height, width))
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    if size != (height, width):
        frame = interpolate(frame[None], size=size, mode="bicubic", antialias=True)[0]
    jpeg = bytes(encode_jpeg(frame.cpu().contiguous(), QUALITY).tolist())
    uri = "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()
    return {"width": size[1], "height": size[0], "bytes": len(jpeg), "uri": uri}


def strip(frames: Tensor | None, most: int) -> dict:
    """Thumbnails of at most `most` of the frames uint8 (F, 3, H, W), evenly chosen, and `of`: how many there are."""
    if frames is None:
        return {"thumbnails": [], "of": 0}
    chosen = torch.linspace(0, len(frames) - 1, min(most, len(frames))).round().long()
    return {"thumbnails": [thumbnail(frame) for frame in frames[chosen]], "of": len(frames)}
