"""The report of runs: one HTML file that needs nothing else, with charts that one can ask.

``known`` gathers what is known of a run, ``layers``, ``series``, ``heat`` and ``happenings`` make
numbers of it, ``words`` the sentences, ``sections`` and ``page`` the HTML. ``page/`` has what the
browser runs: plain files, one idea each, put together as they are.
"""

from gradclip.report.page import write_report as write_report

__all__ = ["write_report"]
