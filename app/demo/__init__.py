"""A provider that speaks the vendors' wire format at any pace, with any fault: for demos, tests and benchmarks."""

from app.demo.server import demo_provider

__all__ = ["demo_provider"]
