"""The engine process: `python -m penstock.serve.engine`, started by `supervisor`, with no HTTP in it.

Setting up: one JSON object on standard input, an `Opening`, then end of file. The process connects to the Unix socket
named there, on which its parent listens for this one connection, and both speak `wire`: first any number of Progress,
then Ready, or Failed with an empty id where the engine cannot be opened; then parts, failures and beats, while
submissions, aborts and at last Stop come in. When the connection ends, so does the process, at once.
"""
