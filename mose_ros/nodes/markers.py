"""What RViz and Foxglove show of a plan: the trajectory as a band, skills and sentence as text above the vehicle."""

import numpy as np
from builtin_interfaces.msg import Duration, Time
from geometry_msgs.msg import Point, Vector3
from std_msgs.msg import ColorRGBA, Header
from visualization_msgs.msg import Marker, MarkerArray

from mose_ros.core.types import Plan
from mose_ros.nodes.conversions import SKILL_SEPARATOR, quaternion


def plan_to_msg(plan: Plan, sentence: str, stamp: Time, frame: str) -> MarkerArray:
    """Fill the markers of a plan in the vehicle's frame; they vanish when no new ones come."""
    band = _marker(0, Marker.LINE_STRIP, stamp, frame, (0.1, 0.8, 1.0, 0.8))
    band.scale = Vector3(x=0.5)
    points = np.vstack([np.zeros((1, 2)), plan.trajectory.xy])
    band.points = [Point(x=float(x), y=float(y), z=0.1) for x, y in points]
    text = _marker(1, Marker.TEXT_VIEW_FACING, stamp, frame, (1.0, 1.0, 1.0, 1.0))
    text.scale = Vector3(z=0.6)
    text.pose.position.z = 3.0
    text.text = '\n'.join([SKILL_SEPARATOR.join(plan.skills.values()), sentence])
    return MarkerArray(markers=[band, text])


def _marker(number: int, kind: int, stamp: Time, frame: str, rgba) -> Marker:
    marker = Marker(header=Header(stamp=stamp, frame_id=frame), ns='mose', id=number, type=kind)
    marker.pose.orientation = quaternion(0.0)
    marker.color = ColorRGBA(**dict(zip('rgba', rgba, strict=True)))
    marker.lifetime = Duration(nanosec=500_000_000)
    return marker
