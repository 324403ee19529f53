"""A Stable-Diffusion-shaped image-to-image service: a real super-resolution network, on the CPU.

POST /sdapi/v1/img2img {"init_images": [base64 PNG or JPEG], "denoising_strength": 0..1, "width": w}
answers {"images": [base64 PNG], ...} as Stable Diffusion's own API does.

The network is ACNet of pyanime4k, whose weights are inside its wheel. It doubles the picture (or brings it to `width`);
`denoising_strength` chooses among its four denoising variants.
"""

import base64
import json
import os
import tempfile
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyanime4k

MODELS = ("acnet-hdn0", "acnet-hdn1", "acnet-hdn2", "acnet-hdn3")
MAX_BODY_BYTES = 32 * 1024 * 1024


def img2img(request: dict) -> dict:
    """Run the network on every picture of `request`. Raises ValueError with words for the caller."""
    started = time.monotonic()
    strength = float(request.get("denoising_strength", 0))
    if not 0 <= strength <= 1:
        raise ValueError("denoising_strength must lie between 0 and 1")
    model = MODELS[min(int(strength * len(MODELS)), len(MODELS) - 1)]
    if not request.get("init_images"):
        raise ValueError("init_images must hold at least one base64 PNG or JPEG")
    images = []
    with tempfile.TemporaryDirectory() as folder:
        for image in request["init_images"]:
            source, target = Path(folder, "in.png"), Path(folder, "out.png")
            source.write_bytes(base64.b64decode(image.rpartition(",")[2], validate=True))
            pixels = pyanime4k.imread(str(source))
            if pixels is None or pixels.size == 0:
                raise ValueError("init_images holds something that is neither PNG nor JPEG")
            factor = min(int(request.get("width", 0)) / pixels.shape[1] or 2.0, 4.0)
            result = pyanime4k.Processor("cpu", 0, model)(pixels, factor)
            pyanime4k.imwrite(str(target), result)
            images.append(base64.b64encode(target.read_bytes()).decode())
    info = {"model": model, "seconds": round(time.monotonic() - started, 3)}
    return {"images": images, "parameters": {"denoising_strength": strength}, "info": json.dumps(info)}


class Handler(BaseHTTPRequestHandler):
    """HTTP/1.1 with keep-alive: the platform keeps its connections."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Say that the service is up."""
        self.answer(200 if self.path == "/health" else 404, {"models": MODELS})

    def do_POST(self) -> None:
        """Answer img2img; anything wrong with the request is a 422 in words."""
        length = int(self.headers.get("Content-Length", 0))
        if length > MAX_BODY_BYTES:
            self.close_connection = True
            return self.answer(413, {"detail": f"the body must not exceed {MAX_BODY_BYTES} bytes"})
        body = self.rfile.read(length)
        if self.path.partition("?")[0] not in {"/sdapi/v1/img2img", "/img2img"}:
            return self.answer(404, {"detail": "Not Found"})
        try:
            return self.answer(200, img2img(json.loads(body)))
        except (ValueError, TypeError, AttributeError) as error:
            return self.answer(422, {"detail": str(error)})

    def answer(self, status: int, body: dict) -> None:
        """Send `body` as JSON."""
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *arguments: object) -> None:
        """One line a request to stdout."""
        print(format % arguments, flush=True)


if __name__ == "__main__":
    # As a container it has port 8080 for itself; as a local process it gets one.
    ThreadingHTTPServer(("", int(os.environ.get("PORT", "8080"))), Handler).serve_forever()
