"""One renderer for each module of tests: on both back ends, or on EGL alone."""

import pytest


@pytest.fixture(scope='module', params=['egl', 'tiny'])
def renderer(request):
    from sim.pictures import open_renderer  # skips where Panda3D is missing

    one = open_renderer(request.param)
    yield one
    one.close()


@pytest.fixture(scope='module')
def egl():
    from sim.pictures import open_renderer

    one = open_renderer('egl')
    yield one
    one.close()
