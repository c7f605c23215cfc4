"""What a card can say by itself, gathered from models, trainers, pipelines, caches and folders."""
