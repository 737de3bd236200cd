"""What a cancellation is: its kinds, the signal, the token, the state and the handlers of an op's author."""
