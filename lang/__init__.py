"""What users write: programs, their tracing, the graph IR and the compiler."""
