"""`longsift view`: a run's report, its windows as a table, and any window under the lens, on this machine alone.

table.py   the windows, ranked once at the start, by pages
app.py     addresses and pages: reading only, for browsers of this machine
server.py  the socket, and the end by Ctrl-C
"""
