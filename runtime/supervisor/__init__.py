"""The runtime in two processes: a worker that can be killed, and a parent that publishes."""
