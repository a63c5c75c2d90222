"""The node that thinks: views in; trajectory and skill chain out at once, the reasoning text after them."""

import threading
import time
from dataclasses import dataclass

import numpy as np
from nav_msgs.msg import Path
from rclpy.qos import QoSProfile
from sensor_msgs.msg import Image
from std_msgs.msg import String
from std_srvs.srv import Trigger
from trajectory_msgs.msg import MultiDOFJointTrajectory
from visualization_msgs.msg import MarkerArray

from mose_ros.core.process import TEXT_NICE
from mose_ros.core.types import Command, EgoState, Guidance, Plan, Views
from mose_ros.engine.bundle import Bundle
from mose_ros.engine.driver import Driver, Thought
from mose_ros.nodes import conversions, markers
from mose_ros.nodes.bearings import Bearings, NotReady
from mose_ros.nodes.lifecycle import ERROR, OK, WARN, run_node
from mose_ros.nodes.network import NetworkNode, NetworkParameters, give_back_memory
from mose_ros.nodes.parameters import parameter
from mose_ros.nodes.worker import Worker


@dataclass(frozen=True, kw_only=True)
class DriverParameters(NetworkParameters):
    """Parameters of the driver."""

    base_frame: str = parameter('ego_vehicle', 'frame of the trajectory: the vehicle')
    odometry_tolerance_s: float = parameter(
        0.15, 'odometry this near to the views serves', minimum=0.0, maximum=1.0
    )
    max_age_s: float = parameter(
        0.3, 'plans older than that are not published', minimum=0.01, maximum=10.0, live=True
    )
    deadline_s: float = parameter(
        0.1, 'plans that are older when published are logged', minimum=0.0, maximum=10.0, live=True
    )
    reasoning: bool = parameter(True, 'put plans into words', live=True)
    reasoning_period_s: float = parameter(
        1.0, 'begin a new text at most this often', minimum=0.0, maximum=60.0, live=True
    )
    reasoning_cancel: bool = parameter(
        False, 'break a text off when its time for a new one has come', live=True
    )
    reasoning_nice: int = parameter(
        TEXT_NICE, 'niceness of the thread that writes the text', minimum=0, maximum=19
    )


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A plan, and what it takes to put it into words."""

    driver: Driver
    plan: Plan
    thought: Thought


class DriverNode(NetworkNode):
    """Plans for each views message; a second thread says why."""

    def __init__(self, **options):
        super().__init__('driver', DriverParameters, **options)
        self._driver = self._planner = self._speaker = self._bearings = None
        self._newest: Answer | None = None
        service = self._on_explain
        self.create_service(Trigger, '~/explain', service, callback_group=self.patient)

    def configure(self) -> None:
        p = self.parameters
        self._driver = self.open()
        manifest = self._driver.manifest
        self.get_logger().info(
            f'bundle {manifest.name}, {manifest.precision}, commit {manifest.commit[:12] or "?"}'
        )
        publish, depth = self.create_lifecycle_publisher, QoSProfile(depth=2)
        self._trajectory = publish(MultiDOFJointTrajectory, 'trajectory', depth)
        self._path = publish(Path, 'path', depth)
        self._skills = publish(String, 'skills', depth)
        self._reasoning = publish(String, 'reasoning', QoSProfile(depth=5))
        self._partial = publish(String, 'reasoning_partial', QoSProfile(depth=5))
        self._markers = publish(MarkerArray, 'markers', depth)
        self._last, self._sentence, self._spoke = -1.0, '', -1e9
        self._planned = 0.0  # when the last plan was published
        self._is_idle = threading.Event()  # no plan is being made
        self._is_idle.set()
        self._bearings = Bearings(self, p.odometry_tolerance_s)
        self._planner = Worker('plan', self._plan, self._failed)
        self._speaker = Worker('speak', self._speak, self._speechless, nice=p.reasoning_nice)
        self.create_subscription(Image, 'views', self._on_views, depth)

    def deactivate(self) -> None:
        if self._planner:
            self._planner.clear()
            self._speaker.clear()
            self._is_idle.set()

    def cleanup(self) -> None:
        if self._bearings:
            self._bearings.close()
        for worker in (self._planner, self._speaker):
            if worker:
                worker.close()
        self._driver = self._planner = self._speaker = self._bearings = self._newest = None
        give_back_memory()

    def load(self, bundle: Bundle) -> Driver:
        """Open the driver and plan once on nothing, so that the first frame finds memory and threads ready."""
        driver = Driver(bundle)
        m = driver.manifest
        candidates = [name for name in m.cameras if name not in m.fixed_views]
        names = (*m.fixed_views, *candidates[: m.top_k])
        shape = (len(names) * m.view_frames * m.view_height, m.view_width, 3)
        views = Views(time=0.0, names=names, image=np.zeros(shape, np.uint8), weights={})
        ahead = Guidance(near=np.zeros(2), far=np.zeros(2), command=Command.FOLLOW)
        driver.plan(views, EgoState(x=0.0, y=0.0, yaw=0.0, speed=0.0), ahead)
        for _ in driver.reason():
            break
        driver.reset()
        return driver

    def take(self, loaded: Driver) -> None:
        self._driver = loaded

    def reset(self) -> None:
        self._planner.clear()
        self._speaker.clear()
        self._bearings.clear()
        self._newest, self._last = None, -1.0

    def _on_views(self, msg: Image) -> None:
        if not self.is_active:
            return
        stamp = conversions.seconds(msg.header.stamp)
        if stamp == self._last:
            self.report('views', WARN, 'the same stamp twice, ignored')
            return
        if stamp < self._last:
            self.report('time', WARN, f'went back by {self._last - stamp:.3f} s: all is forgotten')
            self._bearings.clear()
        self._last = stamp
        self._planner.offer(msg)

    def _plan(self, msg: Image) -> None:
        """Answer one views message; runs in the planning thread."""
        p, driver, started = self.parameters, self._driver, time.perf_counter()
        self._is_idle.clear()
        try:
            views = conversions.views_from_msg(msg)
            input_age = self.now() - views.time
            self._bearings.wait(views.time, 0.01)
            plan = driver.plan(views, *self._bearings.at(views.time))
            age = self.now() - views.time
            if age > p.max_age_s:
                self.report('plan', WARN, f'{age:.2f} s old, not published')
                return
            if not self.is_active:
                return
            self._publish(plan, msg.header.stamp)
        finally:
            self._is_idle.set()
        done = time.perf_counter()
        cycle, self._planned = done - self._planned, done
        answer = self._newest = Answer(driver=driver, plan=plan, thought=driver.thought)
        self.report(
            'plan',
            OK,
            'published',
            skills=conversions.SKILL_SEPARATOR.join(plan.skills.values()),
            action_skill=plan.action_skill,
            age_ms=round(1e3 * age, 1),
            dropped=self._planner.dropped,
        )
        self.debug(
            input_age_ms=1e3 * input_age,
            pipeline_latency_ms=1e3 * age,
            cyclic_time_ms=1e3 * cycle,
            processing_time_ms=1e3 * (done - started),
            stages=plan.timings_ms,
        )
        if age > p.deadline_s:
            stages = ', '.join(f'{stage} {ms:.0f}' for stage, ms in plan.timings_ms.items())
            self.log('late', f'{1e3 * age:.0f} ms: input {1e3 * input_age:.0f}, {stages}')
        self._offer_thought(answer)

    def _publish(self, plan: Plan, stamp) -> None:
        frame = self.parameters.base_frame
        msg = conversions.trajectory_to_msg(plan.trajectory, stamp, frame)
        self._trajectory.publish(msg)  # before all else: it is what the car waits for
        self._skills.publish(conversions.skills_to_msg(plan))
        if self._path.get_subscription_count():
            self._path.publish(conversions.trajectory_to_path(plan.trajectory, stamp, frame))
        if self._markers.get_subscription_count():
            self._markers.publish(markers.plan_to_msg(plan, self._sentence, stamp, frame))

    def _offer_thought(self, answer: Answer) -> None:
        p, now = self.parameters, time.monotonic()
        due = now - self._spoke >= p.reasoning_period_s
        if p.reasoning and due and (p.reasoning_cancel or not self._speaker.busy):
            self._spoke = now
            self._speaker.offer(answer)

    def _speak(self, answer: Answer) -> None:
        """Write the text about one plan; runs in the slower thread, which stands aside while a plan is being made."""
        text = ''

        def cancel() -> bool:
            self._is_idle.wait(0.2)
            overdue = time.monotonic() - self._spoke >= self.parameters.reasoning_period_s
            return not self.is_active or (self.parameters.reasoning_cancel and overdue)

        for text in answer.driver.reason(answer.thought, cancel=cancel):
            self._partial.publish(String(data=text))
        if text and self.is_active:
            self._sentence = text
            self._reasoning.publish(String(data=text))
            self.report('reasoning', OK, 'published')

    async def _on_explain(self, request, response):
        """Answer with the newest plan in full: what was looked at, which skills were chosen, the whole text."""
        newest = self._newest
        if newest is None:
            response.success, response.message = False, f'no plan yet: the node is {self.state}'
            return response

        def words() -> str:
            text = ''
            for text in newest.driver.reason(newest.thought):  # noqa: B007 - the last is whole
                self._is_idle.wait(0.2)  # plans go first
            return text

        try:
            text = await self.in_thread(words)
        except Exception as error:
            response.success, response.message = False, f'{type(error).__name__}: {error}'
            return response
        response.success, response.message = True, explanation(newest.plan, text, self.now())
        return response

    def _failed(self, error: Exception) -> None:
        if isinstance(error, NotReady):
            self.report('plan', WARN, f'none: {error}')
        elif isinstance(error, ValueError | FloatingPointError):
            self.report('plan', ERROR, f'none: {error}')
        else:
            self.report('plan', ERROR, f'none: {type(error).__name__}: {error}')

    def _speechless(self, error: Exception) -> None:
        self.report('reasoning', WARN, f'none: {type(error).__name__}: {error}')


def explanation(plan: Plan, text: str, now: float) -> str:
    """Return a plan in words, one fact a line."""
    way = plan.trajectory
    length = float(np.hypot(*np.diff(np.vstack([np.zeros((1, 2)), way.xy]), axis=0).T).sum())
    chain = [f'{level}: {skill}' for level, skill in plan.skills.items()]
    return '\n'.join(
        [
            f'plan: {now - way.time:.2f} s ago, {length:.1f} m in {way.times()[-1]:.1f} s, '
            f'ends at y {way.xy[-1][1]:+.1f} m with {way.speeds()[-1]:.1f} m/s',
            f'views: {", ".join(plan.views)}',
            f'skills: {", ".join(chain)}; action: {plan.action_skill}',
            f'reasoning: {text}',
        ]
    )


def main() -> None:
    """Run this node until it is told to end."""
    run_node(DriverNode)


if __name__ == '__main__':
    main()
