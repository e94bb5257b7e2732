"""The whole road on one machine, on text found on the machine."""

from illada.demo.road import run_demo

__all__ = ["run_demo"]
