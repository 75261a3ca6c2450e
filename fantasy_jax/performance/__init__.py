"""What a program costs: counted from the model, read off compiled programs, measured on devices."""
