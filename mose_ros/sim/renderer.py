"""The pictures of the simulator: six cameras on the ego vehicle, drawn by plain Panda3D into one off-screen buffer.

All light is baked into the colours of the vertices, so that both back ends, OpenGL through EGL and Panda3D's software
rasteriser, give nearly the same picture. Everything is drawn at twice the size and averaged down. It shares the process
and Panda3D's one graphics engine with MetaDrive but needs nothing of it. Main thread only.
"""

import functools
import logging
from collections.abc import Iterable, Sequence

import cv2
import numpy as np
from jaxtyping import UInt8
from panda3d.core import (
    Camera,
    FrameBufferProperties,
    Geom,
    GeomEnums,
    GeomNode,
    GeomTriangles,
    GeomVertexArrayFormat,
    GeomVertexData,
    GeomVertexFormat,
    GraphicsEngine,
    GraphicsOutput,
    GraphicsPipe,
    GraphicsPipeSelection,
    NodePath,
    PerspectiveLens,
    Texture,
    WindowProperties,
    loadPrcFileData,
)

from mose_ros.core import rig
from mose_ros.core.types import Actor, EgoState
from mose_ros.sim import landscape, looks, meshes
from mose_ros.sim.landscape import Light
from mose_ros.sim.looks import CLASSES
from mose_ros.sim.meshes import Mesh
from mose_ros.sim.roads import RoadMap

__all__ = ['CLASSES', 'Renderer']

_LOG = logging.getLogger(__name__)
_PACKAGES = 'libegl1 libgl1 libgl1-mesa-dri libegl-mesa0'
_COLUMNS = 3  # tiles of the buffer: the rig's cameras in order, left to right, top row first
_OVERSAMPLING = 2
_CELL = 50.0  # m, side of the cells in which the static world is culled
_CLASS_STEP = (
    16  # a class is drawn as this many grey levels per index, so that rounding can't change it
)
_NEAR, _FAR = 0.3, 600.0

# Panda3D prints each display that it tries in vain; what matters is raised or logged here.
loadPrcFileData(
    '', 'notify-level-display fatal\nnotify-level-egldisplay fatal\nnotify-level-x11display fatal'
)


class Renderer:
    """Draws what stands (`load`) and what moves (`render`) as the six cameras of the rig see it."""

    def __init__(self, backend: str = 'auto', size: tuple[int, int] = (256, 144)):
        """Open a back end: 'egl', 'tiny', or 'auto' for EGL and, where that fails, tiny with a warning. size: width, height."""
        self.size = size
        rows = -(-len(rig.RIG) // _COLUMNS)
        self.backend, self._screen = _open(backend, (_COLUMNS * size[0], rows * size[1]))
        self._head = NodePath('head')  # carries the cameras, on the ego vehicle
        for index, camera in enumerate(rig.RIG):
            column, row = index % _COLUMNS, index // _COLUMNS
            tile = (
                column / _COLUMNS,
                (column + 1) / _COLUMNS,
                1 - (row + 1) / rows,
                1 - row / rows,
            )
            self._screen.add_camera(self._camera(camera), tile)
        self._chase = NodePath('chase')
        self._overview: _Screen | None = None  # opened by the first overview
        self._pictures, self._classes = _Stage(classes=False), _Stage(classes=True)

    def _camera(self, camera):
        lens = PerspectiveLens()
        lens.setAspectRatio(self.size[0] / self.size[1])
        lens.setFov(np.rad2deg(camera.fov))  # horizontal; the aspect ratio gives the vertical
        lens.setNearFar(_NEAR, _FAR)
        node = self._head.attachNewNode(Camera(camera.name, lens))
        node.setPos(camera.x, camera.y, camera.z)
        # A Panda3D camera looks along +y, and its pitch is positive upwards.
        node.setHpr(np.rad2deg(camera.yaw) - 90, -np.rad2deg(camera.pitch), 0)
        return node

    def load(self, roads: RoadMap) -> None:
        """Show this map from now on instead of the previous one."""
        self._pictures.load(roads)
        self._classes.load(roads)

    def render(
        self, ego: EgoState, actors: Sequence[Actor]
    ) -> dict[str, UInt8[np.ndarray, 'H W 3']]:
        """Draw one moment; RGB by camera name, in the rig's order."""
        image = _average(self._draw(self._pictures, ego, actors))
        return {name: np.ascontiguousarray(image[tile]) for name, tile in self._tiles()}

    def semantics(
        self, ego: EgoState, actors: Sequence[Actor]
    ) -> dict[str, UInt8[np.ndarray, 'H W']]:
        """Draw what stands at each pixel, as an index into CLASSES, by camera name."""
        shown = self._draw(self._classes, ego, actors)[::-1, :, 0]
        image = (shown[::_OVERSAMPLING, ::_OVERSAMPLING] + _CLASS_STEP // 2) // _CLASS_STEP
        return {name: np.ascontiguousarray(image[tile]) for name, tile in self._tiles()}

    def overview(
        self, ego: EgoState, actors: Sequence[Actor], size: tuple[int, int] = (640, 360)
    ) -> UInt8[np.ndarray, 'H W 3']:
        """Draw the ego vehicle and what surrounds it, from behind and above, for people; RGB of that width and height."""
        if self._overview is None or self._overview.size != size:
            if self._overview is not None:
                self._overview.close()
            _, self._overview = _open(self.backend, size)
            self._chase.getChildren().detach()
            lens = PerspectiveLens()
            lens.setAspectRatio(size[0] / size[1])
            lens.setFov(62)
            lens.setNearFar(1.0, _FAR)
            node = self._chase.attachNewNode(Camera('chase', lens))
            node.setPos(-11.5, 0, 6.2)
            node.setHpr(-90, -19, 0)
            self._overview.add_camera(node, (0, 1, 0, 1))
        body = Actor(
            id='ego', kind='vehicle', type_id='vehicle.ego', x=ego.x, y=ego.y, yaw=ego.yaw,
            size=ego.size, state='braking' if ego.acceleration < -0.7 else '',
        )  # fmt: skip
        self._pictures.place(ego, [*actors, body])
        _put(self._chase, self._pictures.root, ego)
        return _average(self._overview.draw())

    def close(self) -> None:
        """Free the buffers and the scene; the renderer is of no use afterwards."""
        for screen in (self._screen, self._overview):
            if screen is not None:
                screen.close()
        for node in (self._head, self._chase, self._pictures.root, self._classes.root):
            node.removeNode()

    def _draw(self, stage, ego, actors):
        stage.place(ego, actors)
        _put(self._head, stage.root, ego)
        return self._screen.draw()

    def _tiles(self):
        width, height = self.size
        for index, camera in enumerate(rig.RIG):
            x, y = (index % _COLUMNS) * width, (index // _COLUMNS) * height
            yield camera.name, np.s_[y : y + height, x : x + width]


class _Screen:
    """One off-screen buffer, `_OVERSAMPLING` times as wide and high as `size`."""

    def __init__(self, pipe, size):
        self.size = size
        self._pipe, self._cameras = pipe, []
        self._engine = GraphicsEngine.getGlobalPtr()
        self.opened = self._make()

    def _make(self):
        properties = FrameBufferProperties()
        properties.setRgbColor(True)
        properties.setRgbaBits(8, 8, 8, 8)  # four bytes a pixel read back faster than three
        properties.setDepthBits(24)
        # MetaDrive asks for 8 samples process-wide; ours come from the oversampling, on both back ends.
        properties.setMultisamples(0)
        pixels = WindowProperties.size(*(_OVERSAMPLING * side for side in self.size))
        self._buffer = self._engine.makeOutput(
            self._pipe, 'mose', 0, properties, pixels, GraphicsPipe.BFRefuseWindow
        )
        if self._buffer is None:
            return False
        self._texture = Texture()
        self._buffer.addRenderTexture(self._texture, GraphicsOutput.RTMCopyRam)
        self._buffer.setClearColor((0, 0, 0, 1))
        self._buffer.setClearColorActive(True)
        self._buffer.setActive(False)  # or MetaDrive's own frames would draw it too
        for node, tile in self._cameras:
            self._buffer.makeDisplayRegion(*tile).setCamera(node)
        return True

    def add_camera(self, node, tile):
        """Show a camera in that part of the buffer: left, right, bottom, top in 0..1."""
        self._cameras.append((node, tile))
        self._buffer.makeDisplayRegion(*tile).setCamera(node)

    def draw(self):
        """Draw a frame now and return it: BGR or BGRA, rows from bottom to top, gone with the next frame."""
        if self._buffer is None or not self._buffer.isValid():
            # Closing MetaDrive's environment closes every buffer of the process.
            self.close()
            if not self._make():
                raise RuntimeError('the off-screen buffer was closed and Panda3D made no new one')
        self._buffer.setActive(True)
        self._engine.renderFrame()
        self._buffer.setActive(False)
        width, height = (_OVERSAMPLING * side for side in self.size)
        pixels = np.frombuffer(self._texture.getRamImage(), np.uint8)
        return pixels.reshape(height, width, -1)

    def close(self):
        if self._buffer is not None:
            self._engine.removeWindow(self._buffer)
            self._buffer = None


class _Stage:
    """One scene graph: the map and its actors, in colours or, with `classes`, in class numbers."""

    def __init__(self, *, classes: bool):
        self._is_classes = classes
        self._roads: RoadMap | None = None
        self._stale = True
        self._light = Light.of(0)
        self.root = NodePath('stage')
        self._static = self.root.attachNewNode('static')
        self._backdrop = self.root.attachNewNode('backdrop')
        self._nodes: dict[str, tuple[Mesh, NodePath]] = {}

    def load(self, roads):
        """Forget the old map now; the new one is built when it is first looked at."""
        self._roads, self._stale = roads, True
        self._static.getChildren().detach()
        self._backdrop.getChildren().detach()
        for _, node in self._nodes.values():
            node.removeNode()
        self._nodes.clear()

    def place(self, ego: EgoState, actors: Iterable[Actor]):
        """Bring every node to where this moment has it."""
        if self._roads is None:
            raise RuntimeError('no map to draw: call load(roads) first')
        if self._stale:
            self._build()
        self._backdrop.setPos(ego.x, ego.y, 0)
        seen = set()
        for actor in actors:
            seen.add(actor.id)
            mesh = looks.mesh_of(actor, self._roads.seed)
            known = self._nodes.get(actor.id)
            if known is None or known[0] is not mesh:
                if known is not None:
                    known[1].removeNode()
                node = self._attach(self.root, mesh, looks.class_of(actor), turns=True)
                known = self._nodes[actor.id] = (mesh, node)
            known[1].setPosHpr(actor.x, actor.y, 0, np.rad2deg(actor.yaw), 0, 0)
        for gone in self._nodes.keys() - seen:
            self._nodes.pop(gone)[1].removeNode()

    def _build(self):
        self._stale = False
        surfaces, seed = self._roads.surfaces, self._roads.seed
        self._light = Light.of(seed)
        layers = [
            (self._backdrop, 'sky', [landscape.sky(self._light)]),
            (self._backdrop, 'ground', [landscape.hills(self._light, seed)]),
            (self._backdrop, 'ground', [landscape.plain(self._light)]),
            (self._static, 'ground', landscape.meadow(surfaces, self._light, seed).split(_CELL)),
        ]
        for kind, mesh in landscape.ground_layers(
            self._roads.surfaces, self._roads.paint, self._light
        ):
            layers.append((self._static, kind, mesh.split(_CELL)))
        for order, (parent, kind, parts) in enumerate(layers):
            for part in parts:
                node = self._attach(parent, part, kind)
                # All of it lies at height 0, so the order decides what covers what, and depth has no say.
                node.setBin('background', order)
                node.setDepthTest(False)
                node.setDepthWrite(False)
        groups: dict[str, list[Mesh]] = {}
        for actor in self._roads.scenery:
            mesh = looks.mesh_of(actor, self._roads.seed).moved(actor.x, actor.y, actor.yaw)
            groups.setdefault(looks.class_of(actor), []).append(mesh)
        for kind, group in groups.items():
            for part in meshes.join(group).split(_CELL):
                self._attach(self._static, part, kind)

    def _attach(self, parent, mesh, kind, *, turns=False):
        if self._is_classes:
            colors = np.full(mesh.points.shape, CLASSES.index(kind) * _CLASS_STEP, np.uint8)
        else:
            colors = self._light.shade(mesh, turns=turns)
        return parent.attachNewNode(_geom_node(mesh, colors))


def _open(backend, size) -> tuple[str, _Screen]:
    """Return the back end's name and a screen on it."""
    if backend not in ('auto', *_MODULES):
        raise ValueError(f"backend {backend!r}: it is 'auto', 'egl' or 'tiny'")
    for name in ('egl', 'tiny') if backend == 'auto' else (backend,):
        pipe = _pipe(name)
        if pipe is not None and pipe.isValid():
            screen = _Screen(pipe, size)
            if screen.opened:
                return name, screen
        if backend == 'auto' and name == 'egl':
            _LOG.warning(
                'no OpenGL through EGL: drawing in software. Better: apt-get install %s', _PACKAGES
            )
    raise RuntimeError(
        f'Panda3D opened no off-screen buffer with backend {backend!r}; apt-get install {_PACKAGES} '
        'for egl, libx11-6 for tiny'
    )


_MODULES = {'egl': 'p3headlessgl', 'tiny': 'p3tinydisplay'}


@functools.cache  # for good: the end of one EGL pipe ends the display that all of the process share
def _pipe(name) -> GraphicsPipe | None:
    # Named outright rather than through load-display, so that it can't come too late; MetaDrive, when it is
    # started after us, follows load-display and so loads no further driver.
    loadPrcFileData('', f'load-display {_MODULES[name]}')
    selection = GraphicsPipeSelection.getGlobalPtr()
    pipe = selection.makeModulePipe(_MODULES[name])
    # The software module's first pipe wants a display; once loaded it has one more that doesn't.
    return selection.makePipe('TinyOffscreenGraphicsPipe') if name == 'tiny' else pipe


def _put(node, root, ego):
    node.reparentTo(root)
    node.setPosHpr(ego.x, ego.y, 0, np.rad2deg(ego.yaw), 0, 0)


_VERTEX = np.dtype([('point', '<f4', 3), ('color', 'u1', 4)])


def _vertex_format():
    array = GeomVertexArrayFormat()
    array.addColumn('vertex', 3, GeomEnums.NT_float32, GeomEnums.C_point)
    array.addColumn('color', 4, GeomEnums.NT_uint8, GeomEnums.C_color)
    return GeomVertexFormat.registerFormat(GeomVertexFormat(array))


def _geom_node(mesh: Mesh, colors) -> GeomNode:
    """Return the mesh as one piece of geometry."""
    rows = np.empty(len(mesh.points), _VERTEX)
    rows['point'], rows['color'][:, :3], rows['color'][:, 3] = mesh.points, colors, 255
    data = GeomVertexData('mesh', _vertex_format(), Geom.UHStatic)
    data.uncleanSetNumRows(len(rows))
    data.modifyArrayHandle(0).copyDataFrom(rows.tobytes())
    triangles = GeomTriangles(Geom.UHStatic)
    triangles.setIndexType(GeomEnums.NT_uint32)
    indices = triangles.modifyVertices()
    indices.uncleanSetNumRows(mesh.triangles.size)
    indices.modifyHandle().copyDataFrom(np.ascontiguousarray(mesh.triangles, np.uint32).tobytes())
    geom = Geom(data)
    geom.addPrimitive(triangles)
    node = GeomNode('mesh')
    node.addGeom(geom)
    return node


def _average(frame) -> UInt8[np.ndarray, 'H W 3']:
    """Return a drawn frame in RGB from top to bottom, averaged over the blocks of the oversampling."""
    height, width, channels = frame.shape
    size = (width // _OVERSAMPLING, height // _OVERSAMPLING)
    small = cv2.resize(frame, size, interpolation=cv2.INTER_AREA)
    return cv2.cvtColor(small, cv2.COLOR_BGR2RGB if channels == 3 else cv2.COLOR_BGRA2RGB)[::-1]
