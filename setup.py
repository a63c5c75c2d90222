"""Package of mose_ros, for colcon (ament_python) and for pip. The extras are the rooms' needs; constraints.txt holds the versions."""

from pathlib import Path

from setuptools import find_packages, setup

NAME = 'mose_ros'
CORE = ['jaxtyping', 'numpy', 'opencv-python', 'pyyaml', 'tokenizers']
EXTRAS = {  # room: what it needs beside the core
    'ros': [
        'ros-rclpy[fastrtps]',
        'ros-common-interfaces',
        'psutil',
    ],  # where ROS is not installed
    'engine': ['onnxruntime'],
    'tensorrt': ['onnx'],  # beside NVIDIA's own packages
    'bag': ['rosbags'],  # platform:=bag bag:=...
    'sim': ['metadrive-simulator', 'tqdm'],
    'train': [
        'accelerate',
        'fsspec[http]',
        'httpx2',
        'matplotlib',
        'onnx',
        'onnxscript',
        'pyarrow',
        'safetensors',
        'tensorboard',
        'torch',
        'tqdm',
        'transformers>=5.18',  # what modeling takes from it; 5.16 has other rotary positions
    ],
    'cluster': ['ray'],  # collecting and annotating on several machines
    'test': [
        'beartype',
        'carla; sys_platform == "linux" and platform_machine == "x86_64"',  # its types and maps; no server
        'hypothesis',
        'pytest',
        'pytest-timeout',
        'rosbags',
        'ruff',
    ],
    'build': ['colcon-common-extensions', 'colcon-ros'],
}


def share(folder: str) -> list[tuple[str, list[str]]]:
    """Return the data_files entries that put a folder, as it is, into the package's share folder."""
    files = [
        path
        for path in Path(folder).rglob('*')
        if path.is_file() and not path.name.startswith('.')
    ]
    folders = sorted({path.parent for path in files})
    return [
        (f'share/{NAME}/{one}', sorted(str(path) for path in files if path.parent == one))
        for one in folders
    ]


setup(
    name=NAME,
    version='0.1.0',
    packages=find_packages(include=[NAME, f'{NAME}.*']),
    data_files=[
        ('share/ament_index/resource_index/packages', [f'resource/{NAME}']),
        (f'share/{NAME}', ['package.xml']),
        *share('launch'),
        *share('config'),
        *share('models'),
    ],
    python_requires='>=3.10',
    install_requires=[
        'setuptools'
    ],  # colcon's machines have the rest from rosdep; pip's take the extras
    extras_require={name: sorted({*CORE, *needs}) for name, needs in EXTRAS.items()},
    zip_safe=True,
    maintainer='mose_ros maintainers',
    maintainer_email='mose-ros@users.noreply.github.com',
    description='Drive by looking and reasoning: cameras in; a trajectory and reasoning text out.',
    license='Apache-2.0',
    entry_points={
        'console_scripts': [
            'view_router = mose_ros.nodes.view_router_node:main',
            'driver = mose_ros.nodes.driver_node:main',
            'controller = mose_ros.nodes.controller_node:main',
            'carla_state = mose_ros.nodes.carla_state_node:main',
            'carla_objects = mose_ros.nodes.carla_objects:main',
            'simulator = mose_ros.nodes.simulator_node:main',
            'replay = mose_ros.nodes.replay_node:main',
            'doctor = mose_ros.nodes.doctor:main',
            'delivery = mose_ros.nodes.delivery:main',
            'load = mose_ros.nodes.load:main',
            'policy = mose_ros.nodes.policy:main',
            'soak = mose_ros.nodes.soak:main',
            'bag = mose_ros.nodes.bag_node:main',
            'cycles = mose_ros.nodes.cycles:main',
            'engine = mose_ros.engine.__main__:main',
            'drive = mose_ros.nodes.drive:main',
            'train = mose_ros.training.__main__:main',
        ],
    },
)
