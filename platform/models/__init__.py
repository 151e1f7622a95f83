"""The models: teacher tower, twin-arm student, unfactorised student, baseline, and their sizes."""
