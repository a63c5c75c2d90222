"""A process that floods the graph: a thousand commands and a thousand diagnostics a second, until it is killed."""

import time

import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from std_msgs.msg import String


def main() -> None:
    """Flood."""
    rclpy.init()
    node = rclpy.create_node('flood', namespace='/mose')
    order = node.create_publisher(String, 'command', 10)
    health = node.create_publisher(DiagnosticArray, '/diagnostics', 10)
    due = time.monotonic()
    while True:
        order.publish(String(data='follow'))
        health.publish(DiagnosticArray())
        due += 0.001
        time.sleep(max(0.0, due - time.monotonic()))


if __name__ == '__main__':
    main()
