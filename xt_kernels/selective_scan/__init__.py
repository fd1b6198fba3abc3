"""Mamba's selective scan with a state that goes in and comes out."""

from .api import selective_scan

__all__ = ["selective_scan"]
