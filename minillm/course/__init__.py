"""The course as a teacher runs it: what checks a student's piece, and the assignments' way from source to grade."""
