"""The managed node that all nodes of mose_ros are: lifecycle with autostart, heartbeat, diagnostics, throttled logs.

A node says what happens in `configure`, `activate`, `deactivate` and `cleanup`; they may raise. rclpy swallows exceptions of
transitions, so they are logged and reported here: a failed configure leaves the node unconfigured, any other failure takes it
there, silent and freed. What was opened since `configure` is closed after `cleanup`. Knows nothing of driving.
"""

import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import rclpy
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from rcl_interfaces.msg import SetParametersResult
from rclpy import lifecycle
from rclpy.callback_groups import ReentrantCallbackGroup
from rclpy.clock import Clock, ClockType
from rclpy.executors import SingleThreadedExecutor
from rclpy.lifecycle import LifecyclePublisher, TransitionCallbackReturn
from rclpy.publisher import Publisher
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from rclpy.signals import SignalHandlerOptions
from rclpy.timer import Timer
from std_msgs.msg import Float64, Header
from std_srvs.srv import SetBool, Trigger

from mose_ros.nodes.conversions import to_stamp
from mose_ros.nodes.parameters import changed, declare, parameter, refusal

T = TypeVar('T')
OK, WARN, ERROR = DiagnosticStatus.OK, DiagnosticStatus.WARN, DiagnosticStatus.ERROR
SENSOR = QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT)
NEWEST = QoSProfile(depth=1)  # reliable, volatile
LATCHED = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
HEARTBEAT_S = 0.1
POLL_S = 0.005  # the executor is held so long at a time while a thread works for a service


@dataclass(frozen=True, kw_only=True)
class NodeParameters:
    """What every node has."""

    autostart: bool = parameter(True, 'configure and activate without being asked')
    log_period_s: float = parameter(
        2.0, 'the same complaint is logged once in so many seconds', minimum=0.0, live=True
    )


class ManagedNode(lifecycle.Node):
    """A lifecycle node with the habits of this package."""

    def __init__(self, name: str, kind: type[NodeParameters], **options):
        super().__init__(name, **options)
        self.parameters = declare(self, kind)
        self.state = 'unconfigured'
        self.is_enabled = True
        self._opened_before: set = set()
        self._health: dict[str, DiagnosticStatus] = {}
        self._logged: dict[str, float] = {}
        self._heartbeat = self.create_publisher(Header, '~/heartbeat', 10)
        self._diagnostics = self.create_publisher(DiagnosticArray, '/diagnostics', 10)
        self._debug: dict[str, object] = {}
        # of the steady clock: a simulator that waits for our answer stops the simulated one
        self.steady = Clock(clock_type=ClockType.STEADY_TIME)
        self.create_timer(HEARTBEAT_S, self._beat, clock=self.steady)
        self.create_timer(1.0, self._publish_health, clock=self.steady)
        self.add_on_set_parameters_callback(self._set_parameters)
        # of services that take long: in the node's own group nothing else would be called meanwhile
        self.patient = ReentrantCallbackGroup()
        self.create_service(SetBool, '~/set_enabled', self._on_set_enabled)
        self.create_service(Trigger, '~/reset', self._on_reset)
        self._autostart = (
            self.create_timer(0.0, self._start, clock=self.steady)
            if self.parameters.autostart
            else None
        )

    # ---- what nodes fill in ----

    def configure(self) -> None:
        """Load, open, subscribe; whatever takes long or can fail."""

    def activate(self) -> None:
        """Begin to answer."""

    def deactivate(self) -> None:
        """Fall silent."""

    def cleanup(self) -> None:
        """Give back what `configure` took, as far as it got; may be called more than once."""

    def take_over(self, wanted: NodeParameters) -> None:
        """Put live changes of parameters to use where reading `parameters` each time does not; ValueError refuses them."""

    def reset(self) -> None:
        """Forget what was seen and done so far, as at the start of a drive."""

    def may_activate(self) -> bool:
        """Say whether autostart may go from configured to active."""
        return True

    # ---- what nodes use ----

    @property
    def is_active(self) -> bool:
        """Say whether outputs are wanted."""
        return self.state == 'active' and self.is_enabled

    def now(self) -> float:
        """Return the node's clock in seconds: wall time, or simulation time with use_sim_time."""
        return self.get_clock().now().nanoseconds * 1e-9

    def report(self, what: str, level: bytes, message: str, **values) -> None:
        """Set the health of one aspect of the node: a diagnostic at once when it changes, and a log line when it is bad."""
        status = DiagnosticStatus(level=level, message=message, hardware_id='mose_ros')
        status.name = f'{self.get_fully_qualified_name().lstrip("/")}: {what}'
        status.values = [KeyValue(key=key, value=str(value)) for key, value in values.items()]
        before = self._health.get(what)
        self._health[what] = status
        is_news = before is None or (before.level, before.message) != (level, message)
        if level != OK:
            self.log(what, message, error=level == ERROR)
        elif before is not None and before.level != OK:
            self.get_logger().info(f'{what}: {message}')
        if is_news and (level != OK or before is not None):
            self._publish_health()

    def log(self, key: str, message: str, *, error: bool = False) -> None:
        """Log a complaint, each key at most once per `log_period_s`."""
        now = time.monotonic()
        if now - self._logged.get(key, -1e9) < self.parameters.log_period_s:
            return
        self._logged[key] = now
        logger = self.get_logger()
        logger.error(f'{key}: {message}') if error else logger.warning(f'{key}: {message}')

    def debug(self, *, stages: Mapping[str, float] | None = None, **milliseconds: float) -> None:
        """Publish figures as debug/<name>, those of stages as debug/processing_time/<stage>_ms; all in milliseconds."""
        deeper = {f'processing_time/{name}_ms': ms for name, ms in (stages or {}).items()}
        for name, value in {**milliseconds, **deeper}.items():
            if name not in self._debug:
                topic = f'~/debug/{name}'
                self._debug[name] = self.create_publisher(Float64, topic, NEWEST)
            self._debug[name].publish(Float64(data=float(value)))

    def guarded(self, what: str, callback: Callable) -> Callable:
        """Wrap a callback: bad input is reported under `what` and ignored; nothing else of the node is touched."""

        def call(msg):
            try:
                callback(msg)
            except ValueError as error:
                self.report(what, ERROR, str(error))

        return call

    async def in_thread(self, work: Callable[[], T]) -> T:
        """Run what takes long in a thread of its own, while the executor goes on; for services in the group `patient`.

        Polled, since a coroutine that waits for a rclpy future is resumed again and again without a pause.
        """
        done = threading.Event()
        answer: list = []

        def run():
            try:
                answer.append(work())
            except Exception as error:
                answer.append(error)
            done.set()

        threading.Thread(target=run, name='service', daemon=True).start()
        while not done.wait(POLL_S):
            await _Pause()
        if isinstance(answer[0], Exception):
            raise answer[0]
        return answer[0]

    def close(self) -> None:
        """Leave in order, from any state."""
        self.state = 'finalized'
        for step in (self.deactivate, self._cleanup):
            try:
                step()
            except Exception:
                self.get_logger().error(traceback.format_exc())

    # ---- the machinery ----

    def on_configure(self, state):
        self._opened_before = set(self._entities())
        return self._transition(
            'configure', self.configure, super().on_configure, state, 'inactive'
        )

    def on_activate(self, state):
        return self._transition('activate', self.activate, super().on_activate, state, 'active')

    def on_deactivate(self, state):
        self.state = 'inactive'  # at once: callbacks of other threads look at it
        return self._transition(
            'deactivate', self.deactivate, super().on_deactivate, state, 'inactive'
        )

    def on_cleanup(self, state):
        return self._transition(
            'cleanup', self._cleanup, super().on_cleanup, state, 'unconfigured'
        )

    def on_shutdown(self, state):
        self.close()
        return TransitionCallbackReturn.SUCCESS

    def on_error(self, state):
        self.close()
        self.state = 'unconfigured'
        return TransitionCallbackReturn.SUCCESS

    def _transition(self, name, own, inherited, state, target) -> TransitionCallbackReturn:
        started = time.perf_counter()
        try:
            own()
            if inherited(state) != TransitionCallbackReturn.SUCCESS:
                raise RuntimeError(f'a publisher refused to {name}')
        except Exception as error:
            expected = isinstance(error, ValueError | OSError)
            detail = str(error) if expected else traceback.format_exc()
            self.report('lifecycle', ERROR, f'{name} failed: {error}')
            self.get_logger().error(f'{name} failed: {detail}')
            if name != 'configure':
                return TransitionCallbackReturn.ERROR  # on_error follows
            self._cleanup()
            return TransitionCallbackReturn.FAILURE
        if name in ('deactivate', 'cleanup'):  # what was true while it ran is true no more
            self._health = {}
        self.state = target
        took = time.perf_counter() - started
        self.report('lifecycle', OK, f'{target}')
        self.get_logger().info(f'{name}: now {target}, after {took:.2f} s')
        return TransitionCallbackReturn.SUCCESS

    def _cleanup(self) -> None:
        try:
            self.cleanup()
        finally:
            self._close_opened()

    def _close_opened(self) -> None:
        self._debug = {}
        for one in [one for one in self._entities() if one not in self._opened_before]:
            if isinstance(one, LifecyclePublisher):
                self.destroy_lifecycle_publisher(one)
            elif isinstance(one, Publisher):
                self.destroy_publisher(one)
            elif isinstance(one, Timer):
                self.destroy_timer(one)
            else:
                self.destroy_subscription(one)

    def _entities(self):
        """Yield what is open; the clock of simulated time is ROS's own and comes and goes with a parameter."""
        yield from self.publishers
        yield from self.timers
        yield from (one for one in self.subscriptions if one.topic_name != '/clock')

    def _start(self) -> None:
        """Take the next step of autostart; where one fails, whoever mends the cause configures the node again."""
        answer = TransitionCallbackReturn.SUCCESS
        if self.state == 'unconfigured':
            answer = self.trigger_configure()
            self._autostart.timer_period_ns = int(0.05e9)
        if self.state == 'inactive' and self.may_activate():
            answer = self.trigger_activate()
        if answer != TransitionCallbackReturn.SUCCESS or self.state == 'active':
            self.destroy_timer(self._autostart)

    def _beat(self) -> None:
        self._heartbeat.publish(Header(stamp=to_stamp(self.now()), frame_id=self.state))

    def _publish_health(self) -> None:
        msg = DiagnosticArray(status=list(self._health.values()))
        msg.header.stamp = to_stamp(self.now())
        self._diagnostics.publish(msg)

    def _on_set_enabled(self, request, response):
        self.is_enabled = request.data
        self.report('enabled', OK if request.data else WARN, _ENABLED[request.data])
        response.success, response.message = True, f'{self.state}, {_ENABLED[request.data]}'
        return response

    def _on_reset(self, request, response):
        response.success = self.state in ('inactive', 'active')
        if response.success:
            self.reset()
        response.message = 'forgotten' if response.success else f'it is {self.state}'
        return response

    def set_parameters(self, parameter_list):
        """Set parameters one by one, as rclpy does; a refusal names the range and the remedy."""
        results = zip(super().set_parameters(parameter_list), parameter_list, strict=True)
        return [self._explained(result, [one]) for result, one in results]

    def set_parameters_atomically(self, parameter_list):
        """Set parameters all or none, as rclpy does; a refusal names the range and the remedy."""
        return self._explained(super().set_parameters_atomically(parameter_list), parameter_list)

    def _explained(self, result, given) -> SetParametersResult:
        if not result.successful:
            reasons = [refusal(self.parameters, one.name, one.value) for one in given]
            result.reason = '; '.join(filter(None, reasons)) or result.reason
        return result

    def _set_parameters(self, given) -> SetParametersResult:
        try:
            wanted = changed(self.parameters, {one.name: one.value for one in given})
            self.take_over(wanted)
        except ValueError as error:
            return SetParametersResult(successful=False, reason=str(error))
        self.parameters = wanted
        return SetParametersResult(successful=True)


_ENABLED = {True: 'enabled', False: 'disabled by set_enabled'}


class _Pause:
    """Gives the executor a turn."""

    def __await__(self):
        yield


def run_node(
    make_node: Callable[[], ManagedNode],
    args: list[str] | None = None,
    main_thread: Callable[[ManagedNode, threading.Event], None] | None = None,
) -> None:
    """Run one node in this process until SIGINT or SIGTERM; exit code 2 with one clear line for bad parameters.

    `main_thread(node, stop)` gets the main thread where it needs that; the executor then has one of its own.
    """
    stop = threading.Event()
    try:
        # our own handlers: rclpy's end the context under the feet of whoever is just publishing
        rclpy.init(args=args, signal_handler_options=SignalHandlerOptions.NO)
        node = make_node()
    except Exception as error:
        rclpy.try_shutdown()
        if not isinstance(error, ValueError) and not type(error).__name__.startswith('RCL'):
            raise
        print(f'error: {error}', file=sys.stderr)
        sys.exit(2)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    executor = SingleThreadedExecutor()
    executor.add_node(node)

    def spin():
        while not stop.is_set():
            executor.spin_once(timeout_sec=0.2)

    try:
        if main_thread is None:
            spin()
        else:
            thread = threading.Thread(target=spin, name='executor', daemon=True)
            thread.start()
            main_thread(node, stop)
            thread.join(2.0)
    finally:
        stop.set()
        node.close()
        executor.shutdown(timeout_sec=1.0)
        node.destroy_node()
        rclpy.try_shutdown()
