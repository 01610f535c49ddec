"""What backends share: queue, loading and freeing of a model, media policy, jobs."""
