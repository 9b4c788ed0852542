"""Show routing on one page: which experts ran for each token, and how much each domain weighed."""

from factormix.show.page import write_page
from factormix.show.summary import summarise
from factormix.show.trace import SiteTrace, Trace, record, trace

__all__ = ["SiteTrace", "Trace", "record", "summarise", "trace", "write_page"]
