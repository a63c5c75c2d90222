"""What of the controller may be set: the vehicle's measures, the limits of what is believed, and how the car is brought to rest."""

from dataclasses import dataclass, replace

from mose_ros.core.control import METADRIVE, VehicleModel
from mose_ros.core.controller import Caution
from mose_ros.core.safety import TrajectoryLimits
from mose_ros.nodes.lifecycle import NodeParameters
from mose_ros.nodes.parameters import parameter
from mose_ros.nodes.vehicle_command import BACKENDS

_CAUTION = Caution()
_LIMITS = _CAUTION.limits


@dataclass(frozen=True, kw_only=True)
class ControllerParameters(NodeParameters):
    """Parameters of the controller; lengths and gains are the vehicle's."""

    control_backend: str = parameter('sim', 'whom the commands are for', choices=BACKENDS)
    role_name: str = parameter('ego_vehicle', 'role of the vehicle in CARLA')
    command_topic: str = parameter('', "topic of the commands; empty: the backend's own")
    period_s: float = parameter(
        0.1, 'a command at least this often; plans come this often', minimum=0.05, maximum=1.0
    )
    answer_ticks: bool = parameter(
        False, 'one command for each /clock, with its stamp: for a simulator that waits for it'
    )

    # ---- when an input is missing ----
    watch: tuple[str, ...] = parameter(('view_router', 'driver'), 'nodes that must be alive')
    heartbeat_timeout_s: float = parameter(
        0.22,
        's without heartbeat of a watched node until it is noticed',
        minimum=0.15,
        maximum=5.0,
    )
    odometry_timeout_s: float = parameter(
        _CAUTION.odometry_timeout_s,
        's without odometry until it is noticed',
        minimum=0.05,
        maximum=2.0,
        live=True,
    )
    trajectory_max_age_s: float = parameter(
        _CAUTION.plan_max_age_s,
        's; an older trajectory is not accepted',
        minimum=0.05,
        maximum=2.0,
        live=True,
    )
    grace_s: float = parameter(
        _CAUTION.grace_s,
        's that are driven on, degraded, after an input is noticed to be missing',
        minimum=0.0,
        maximum=2.0,
        live=True,
    )

    # ---- how the car comes to rest, and when it goes on ----
    comfortable_deceleration: float = parameter(
        _CAUTION.comfortable_deceleration,
        'm/s^2 of the first answer to a fault',
        minimum=0.5,
        maximum=5.0,
        live=True,
    )
    hard_deceleration: float = parameter(
        _CAUTION.hard_deceleration,
        'm/s^2 of an emergency stop: what the vehicle can',
        minimum=1.0,
        maximum=10.0,
        live=True,
    )
    hard_after_s: float = parameter(
        _CAUTION.hard_after_s,
        's; a fault that lasts so long is braked for hard',
        minimum=0.0,
        maximum=10.0,
    )
    recover_after_s: float = parameter(
        _CAUTION.recover_after_s,
        's without fault that end the braking of a rolling car',
        minimum=0.0,
        maximum=10.0,
    )
    restart_after_s: float = parameter(
        _CAUTION.restart_after_s,
        's without fault until a car that was stopped drives off',
        minimum=0.0,
        maximum=60.0,
    )
    relapse_s: float = parameter(
        _CAUTION.relapse_s,
        's after a stop in which another doubles these times',
        minimum=0.0,
        maximum=600.0,
    )
    degraded_speed: float = parameter(
        _CAUTION.degraded_speed,
        'm/s beyond which a degraded car gains no speed',
        minimum=0.0,
        maximum=60.0,
        live=True,
    )

    # ---- what a trajectory may ask for ----
    max_speed: float = parameter(
        _LIMITS.speed, 'm/s of a trajectory', minimum=1.0, maximum=60.0, live=True
    )
    max_start_offset: float = parameter(
        _LIMITS.start_offset,
        'm from the car to where a trajectory begins',
        minimum=0.1,
        maximum=10.0,
        live=True,
    )
    max_curvature: float = parameter(
        _LIMITS.curvature, '1/m of a trajectory', minimum=0.01, maximum=2.0, live=True
    )
    max_lateral_acceleration: float = parameter(
        _LIMITS.lateral_acceleration,
        'm/s^2 of a trajectory',
        minimum=0.5,
        maximum=15.0,
        live=True,
    )
    max_acceleration: float = parameter(
        _LIMITS.acceleration, 'm/s^2 of a trajectory', minimum=0.5, maximum=15.0, live=True
    )
    max_deceleration: float = parameter(
        _LIMITS.deceleration, 'm/s^2 of a trajectory', minimum=0.5, maximum=20.0, live=True
    )
    max_jerk: float = parameter(
        _LIMITS.jerk, 'm/s^3 of a trajectory', minimum=1.0, maximum=500.0, live=True
    )
    max_odometry_jump: float = parameter(
        _CAUTION.max_odometry_jump,
        'm between a pose and where speed and heading led',
        minimum=0.05,
        maximum=50.0,
    )

    # ---- the vehicle ----
    wheelbase: float = parameter(METADRIVE.wheelbase, 'm', minimum=0.5, maximum=10.0)
    rear_axle: float = parameter(
        METADRIVE.rear_axle, 'm from the rear axle to the centre of the body', minimum=0.0
    )
    max_steer: float = parameter(
        METADRIVE.max_steer, 'rad of the front wheels at steer 1', minimum=0.05, maximum=1.5
    )
    throttle_gain: float = parameter(
        METADRIVE.throttle_gain, 'm/s^2 at throttle 1', minimum=0.1, maximum=20.0
    )
    brake_gain: float = parameter(
        METADRIVE.brake_gain, 'm/s^2 at brake 1', minimum=1.0, maximum=100.0
    )
    wheel_angle: float = parameter(
        0.0, 'rad that ackermann and twist ask for at steer 1; 0: max_steer', minimum=0.0
    )
    hold_brake: float = parameter(
        METADRIVE.hold_brake, 'brake that keeps the car at rest', minimum=0.0, maximum=1.0
    )

    def vehicle(self) -> VehicleModel:
        """Return how the vehicle answers its actuators."""
        return replace(
            METADRIVE,
            wheelbase=self.wheelbase,
            rear_axle=self.rear_axle,
            max_steer=self.max_steer,
            throttle_gain=self.throttle_gain,
            brake_gain=self.brake_gain,
            hold_brake=self.hold_brake,
        )

    def caution(self, early_s: float) -> Caution:
        """Return what is believed and how the car comes to rest; `early_s`: a stamp may be so far ahead of the clock."""
        return Caution(
            limits=TrajectoryLimits(
                speed=self.max_speed,
                start_offset=self.max_start_offset,
                curvature=self.max_curvature,
                lateral_acceleration=self.max_lateral_acceleration,
                acceleration=self.max_acceleration,
                deceleration=self.max_deceleration,
                jerk=self.max_jerk,
            ),
            plan_max_age_s=self.trajectory_max_age_s,
            odometry_timeout_s=self.odometry_timeout_s,
            early_s=early_s,
            grace_s=self.grace_s,
            comfortable_deceleration=self.comfortable_deceleration,
            hard_deceleration=self.hard_deceleration,
            hard_after_s=self.hard_after_s,
            recover_after_s=self.recover_after_s,
            restart_after_s=self.restart_after_s,
            relapse_s=self.relapse_s,
            degraded_speed=self.degraded_speed,
            max_odometry_jump=self.max_odometry_jump,
        )
