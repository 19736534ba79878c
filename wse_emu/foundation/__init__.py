"""Names and numbers: specifications of wafers and models, and the errors of the project."""
