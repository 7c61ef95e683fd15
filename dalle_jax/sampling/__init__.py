"""From trained stages to pictures: library functions first."""
