"""What a run says, without torch: its folder, its records, and the measured cells made of them."""
