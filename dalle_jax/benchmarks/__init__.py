"""What `bench` times: one case per network and use, and the stopwatch."""
