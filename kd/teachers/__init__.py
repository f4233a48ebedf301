"""What a student learns from: one interface, several kinds of teacher."""
