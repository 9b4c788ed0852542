"""Looking at routing: which experts fired for each token, how much each domain weighed, on one page."""

from factormix.show.page import write_page
from factormix.show.summary import summarise
from factormix.show.trace import SiteTrace, Trace, record, trace

__all__ = ["SiteTrace", "Trace", "record", "summarise", "trace", "write_page"]
