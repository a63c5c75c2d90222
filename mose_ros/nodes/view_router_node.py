"""The node that looks: newest frame of each camera in, the views worth a full look out."""

import threading
import time
from dataclasses import dataclass

import numpy as np
from rclpy.qos import QoSProfile
from sensor_msgs.msg import CompressedImage, Image
from std_msgs.msg import Float32MultiArray

from mose_ros.core.pictures import PictureCheck
from mose_ros.core.rig import CAMERAS
from mose_ros.core.types import Command, EgoState, Guidance
from mose_ros.engine.bundle import Bundle
from mose_ros.engine.view_router import MODES, ViewRouter
from mose_ros.nodes import conversions, images
from mose_ros.nodes.bearings import Bearings, NotReady
from mose_ros.nodes.camera_health import CameraHealth
from mose_ros.nodes.lifecycle import ERROR, OK, SENSOR, WARN, run_node
from mose_ros.nodes.network import NetworkNode, NetworkParameters, give_back_memory
from mose_ros.nodes.parameters import parameter
from mose_ros.nodes.worker import Worker

WATCH_S = 0.05


@dataclass(frozen=True, kw_only=True)
class ViewRouterParameters(NetworkParameters):
    """Parameters of the view router."""

    mode: str = parameter('learned', 'how candidate views are chosen', choices=MODES, live=True)
    force_view: str = parameter('', 'a camera that is always looked at', live=True)
    cameras: tuple[str, ...] = parameter(CAMERAS, 'names of the cameras that there are')
    camera_topic: str = parameter(
        '/carla/ego_vehicle/{camera}/image', 'topic of a camera; {camera} is its name'
    )
    camera_topics: tuple[str, ...] = parameter(
        (), 'instead of camera_topic: one topic for each of `cameras`, in order'
    )
    transport: str = parameter('raw', 'how pictures come', choices=('raw', 'compressed'))
    slop_s: float = parameter(
        0.02, 'pictures of one moment have stamps this near', minimum=0.0, maximum=1.0, live=True
    )
    sync_wait_s: float = parameter(
        0.02, 'wait so long for the others after the anchor', minimum=0.0, maximum=1.0, live=True
    )
    camera_timeout_s: float = parameter(
        0.25, 'an older picture than that is masked', minimum=0.0, maximum=10.0, live=True
    )
    odometry_tolerance_s: float = parameter(
        0.15, 'odometry this near to the picture serves', minimum=0.0, maximum=1.0
    )
    max_age_s: float = parameter(
        0.3, 'views older than that are not published', minimum=0.01, maximum=10.0, live=True
    )


class ViewRouterNode(NetworkNode):
    """Chooses views at each new frame of the anchor camera."""

    def __init__(self, **options):
        super().__init__('view_router', ViewRouterParameters, **options)
        self._router = self._worker = self._bearings = None

    def configure(self) -> None:
        p = self.parameters
        topics = p.camera_topics or tuple(p.camera_topic.format(camera=name) for name in p.cameras)
        if len(topics) != len(p.cameras):
            raise ValueError(f'{len(topics)} camera_topics for {len(p.cameras)} cameras')
        self._router = self.open()
        known, self._anchor = self._router.manifest.cameras, self._router.manifest.anchor
        for name in set(p.cameras) - set(known):
            self.log('cameras', f'{name} is not known to the bundle and not looked at')
        self._views = self.create_lifecycle_publisher(Image, 'views', QoSProfile(depth=2))
        self._weights = self.create_lifecycle_publisher(Float32MultiArray, 'view_weights', 2)
        self._frames: dict[str, Image | CompressedImage] = {}
        self._arrived = threading.Condition()
        self._last = -1.0  # stamp of the newest anchor frame
        self._anchor_came: float | None = None  # when, by the node's clock
        self._looked = 0.0  # when the last views were published
        self._cameras = {name: CameraHealth() for name in p.cameras if name in known}
        self._checks = {name: PictureCheck() for name in self._cameras}
        self._bearings = Bearings(self, p.odometry_tolerance_s)
        self._worker = Worker('look', self._look, self._failed)
        self.create_timer(WATCH_S, self._watch_anchor, clock=self.steady)
        kind = Image if p.transport == 'raw' else CompressedImage
        for name, topic in zip(p.cameras, topics, strict=True):
            if name in known:
                self.create_subscription(kind, topic, self._listener(name), SENSOR)

    def deactivate(self) -> None:
        if self._worker:
            self._worker.clear()

    def cleanup(self) -> None:
        if self._worker:
            self._worker.close()
            self._bearings.close()
        self._router = self._worker = self._bearings = None
        self._frames = {}
        give_back_memory()

    def load(self, bundle: Bundle) -> ViewRouter:
        """Open the view router and look once at nothing, so that the first frame finds memory and threads ready."""
        p = self.parameters
        router = ViewRouter(bundle, mode=p.mode, force_view=p.force_view)
        manifest = router.manifest
        if manifest.anchor not in p.cameras:
            raise ValueError(f'cameras lack the anchor {manifest.anchor!r} of the bundle')
        if self._router and manifest.cameras != self._router.manifest.cameras:
            raise ValueError(
                f'{bundle.folder} knows other cameras ({", ".join(manifest.cameras)}): '
                'clean up and configure the node instead'
            )
        black = np.zeros((144, 256, 3), np.uint8)
        ahead = Guidance(near=np.zeros(2), far=np.zeros(2), command=Command.FOLLOW)
        ego = EgoState(x=0.0, y=0.0, yaw=0.0, speed=0.0)
        router.select(0.0, dict.fromkeys(manifest.cameras, black), ego, ahead)
        router.reset()
        return router

    def take(self, loaded: ViewRouter) -> None:
        self._router, self._anchor = loaded, loaded.manifest.anchor

    def take_over(self, wanted: ViewRouterParameters) -> None:
        if self._router:
            self._router.aim(wanted.mode, wanted.force_view)

    def reset(self) -> None:
        self._forget()

    def _listener(self, name: str):
        health = self._cameras[name]

        def hear(msg):
            stamp = conversions.seconds(msg.header.stamp)
            health.heard(stamp, self.now())
            with self._arrived:
                self._frames[name] = msg
                self._arrived.notify_all()
            if name == self._anchor and self.is_active:
                self._on_anchor(msg, stamp)

        return hear

    def _on_anchor(self, msg: Image | CompressedImage, stamp: float) -> None:
        if stamp == self._last:
            self.report('anchor', WARN, 'the same stamp twice: the camera is frozen')
            return
        if stamp < self._last:
            self.report('time', WARN, f'went back by {self._last - stamp:.3f} s: all is forgotten')
            self._forget()
        self._last, self._anchor_came = stamp, self.now()
        self._worker.offer(msg)

    def _watch_anchor(self) -> None:
        """Say at once that the anchor's pictures no longer come: the controller waits for nothing else."""
        if not self.is_active:
            self._anchor_came = None
        if self._anchor_came is None:
            return
        now = self.now()
        self._anchor_came = min(self._anchor_came, now)  # simulated time goes back
        if now - self._anchor_came > self.parameters.camera_timeout_s:
            self.report(f'camera {self._anchor}', ERROR, 'masked: no new picture')

    def _forget(self) -> None:
        with self._arrived:
            anchor = self._frames.get(self._anchor)
            self._frames = {} if anchor is None else {self._anchor: anchor}
        self._router.reset()
        self._bearings.clear()

    def _look(self, anchor: Image | CompressedImage) -> None:
        """Answer one frame of the anchor; runs in the worker."""
        p, router, started = self.parameters, self._router, time.perf_counter()
        stamp = conversions.seconds(anchor.header.stamp)
        with self._arrived:
            self._arrived.wait_for(lambda: self._is_complete(stamp), p.sync_wait_s)
            frames = {**self._frames, self._anchor: anchor}  # a newer one may have come meanwhile
        self._bearings.wait(stamp, p.sync_wait_s)
        waited = time.perf_counter()
        ego, guidance = self._bearings.at(stamp)
        pictures = self._decode(frames, stamp, router.manifest.cameras, (ego.x, ego.y))
        decoded = time.perf_counter()
        views = router.select(stamp, pictures, ego, guidance)
        age = self.now() - stamp
        if age > p.max_age_s:
            self.report('views', WARN, f'{age:.2f} s old, not published')
            return
        if not self.is_active:
            return
        self._views.publish(conversions.views_to_msg(views, anchor.header.stamp))
        self._weights.publish(conversions.weights_to_msg(views))
        done = time.perf_counter()
        cycle, self._looked = done - self._looked, done
        self.report(
            'views',
            OK,
            'published',
            views=','.join(views.names),
            age_ms=round(1e3 * age, 1),
            dropped=self._worker.dropped,
        )
        self.debug(
            input_age_ms=1e3 * (age - (done - started)),
            pipeline_latency_ms=1e3 * age,
            cyclic_time_ms=1e3 * cycle,
            processing_time_ms=1e3 * (done - started),
            stages={
                'wait': 1e3 * (waited - started),
                'decode': 1e3 * (decoded - waited),
                'route': 1e3 * (done - decoded),
                'total': 1e3 * (done - started),
            },
        )

    def _is_complete(self, stamp: float) -> bool:
        """Say whether all cameras that are alive have delivered their picture of this moment."""
        p = self.parameters
        ages = (stamp - conversions.seconds(msg.header.stamp) for msg in self._frames.values())
        return all(age <= p.slop_s or age > p.camera_timeout_s for age in ages)

    def _decode(self, frames: dict, stamp: float, known: tuple[str, ...], place) -> dict:
        """Return the pictures that serve; the others are masked and reported, one diagnostic each."""
        read = (
            images.image_from_msg
            if self.parameters.transport == 'raw'
            else images.image_from_compressed
        )
        pictures = {}
        for name in self.parameters.cameras:
            if name not in known:
                continue
            health = self._cameras[name]
            try:
                if name not in frames:
                    raise NotReady('no picture yet')
                msg = frames[name]
                taken = conversions.seconds(msg.header.stamp)
                age = stamp - taken
                if abs(age) > self.parameters.camera_timeout_s:
                    raise NotReady(f'the picture is {age:.2f} s old' if age < 1e4 else 'is lost')
                if health.is_stuck and name != self._anchor:  # the anchor's is told when it comes
                    raise ValueError('the same stamp twice: the camera is frozen')
                picture = read(msg)
                health.seen(picture)
                note = self._checks[name].check(taken, picture, place)
                level, said, more = (WARN, note, {}) if note else (OK, 'arrives', {})
                pictures[name] = picture
            except NotReady as error:
                level, said, more = WARN, 'masked: no new picture', {'detail': error}
            except ValueError as error:
                level = ERROR if name == self._anchor else WARN
                said, more = f'masked: {error}', {}
            values = health.values(stamp)
            self.report(f'camera {name}', level, said, **values, **more)
        return pictures

    def _failed(self, error: Exception) -> None:
        if isinstance(error, NotReady):
            self.report('views', WARN, f'none: {error}')
        elif isinstance(error, ValueError | FloatingPointError):
            self.report('views', ERROR, f'none: {error}')
        else:
            self.report('views', ERROR, f'none: {type(error).__name__}: {error}')


def main() -> None:
    """Run this node until it is told to end."""
    run_node(ViewRouterNode)


if __name__ == '__main__':
    main()
