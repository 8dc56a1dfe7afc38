"""What one needs besides methods: pretrained models and real tasks."""
