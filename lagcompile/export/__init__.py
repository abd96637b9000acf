"""Programs out of this process: a self-contained folder and back, LaTeX for a paper, a drawing of the stages."""
