"""What a training shows of itself: pictures, held-out loss, the health of the few-step ability."""
