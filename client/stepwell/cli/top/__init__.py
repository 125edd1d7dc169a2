"""`stepwell top`: what a server does now. Its numbers are those of the metrics (`scrape`), seen twice (`picture`)."""

from stepwell.cli.top.command import top

__all__ = ["top"]
