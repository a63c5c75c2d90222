"""Shape and type checks of core while tests run; on the vehicle its annotations cost nothing. And the options of long runs."""

from jaxtyping import install_import_hook

install_import_hook('mose_ros.core', 'beartype.beartype')


def pytest_addoption(parser):
    parser.addoption(
        '--messages', type=int, default=0, help='how many hostile messages test_fuzz.py sends'
    )
