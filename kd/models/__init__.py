"""Teacher and student: loading, the teacher's hidden states, and the student with its loss."""
