from rest_rl.objects import load_object
def load_environment(source, *, tasks="", reward="", options=None):
    return load_object(source, "environment")
