"""Plans of a run on machines that are absent: memory, time and traffic, from the compiler."""
