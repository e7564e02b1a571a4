"""Training-free choices of which tokens stay, on the teacher: what learned eviction is held against."""
