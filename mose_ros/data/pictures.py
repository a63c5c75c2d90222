"""Pictures that are shown to a model behind an API: a file as it lies on disk and, where it is about a part of it, a red frame."""

import base64
import hashlib
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

RED = (40, 40, 255)  # BGR


@dataclass(frozen=True, kw_only=True)
class Picture:
    """An encoded picture and the region it is about, if any."""

    data: bytes
    box: tuple[float, float, float, float] | None = None  # x, y, width, height in px

    def identity(self) -> dict[str, Any]:
        """Return what tells this picture from others: of the file, not of how it is encoded for sending."""
        return {'sha256': hashlib.sha256(self.data).hexdigest(), 'box': self.box}

    def data_url(self, max_side: int) -> str:
        """Return the picture as a URL, no side longer than `max_side` px; ValueError where it cannot be decoded."""
        data, kind = self.data, 'png' if self.data.startswith(b'\x89PNG') else 'jpeg'
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR) if data else None
        if image is None:
            raise ValueError(f'a picture of {len(data)} bytes cannot be decoded')
        scale = max_side / max(image.shape[:2])
        if self.box is not None or scale < 1:
            image = self._framed(image)
            if scale < 1:
                size = tuple(max(round(side * scale), 1) for side in image.shape[1::-1])
                image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
            data, kind = cv2.imencode('.jpg', image, [cv2.IMWRITE_JPEG_QUALITY, 90])[1], 'jpeg'
        return f'data:image/{kind};base64,{base64.b64encode(data).decode()}'

    def _framed(self, image: np.ndarray) -> np.ndarray:
        if self.box is None:
            return image
        x, y, width, height = (round(value) for value in self.box)
        thick = max(2, round(max(image.shape[:2]) / 400))  # still seen when made smaller
        return cv2.rectangle(image.copy(), (x, y), (x + width, y + height), RED, thick)
