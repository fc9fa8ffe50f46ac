"""A student and its teacher: losses, what the teacher says, students out of teachers."""
