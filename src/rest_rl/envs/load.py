from rest_rl.objects import load_object


def load_environment(source, *, tasks="", reward="", options=None):
    if source == "shop":
        from rest_rl.envs.shop import Shop

        return Shop()
    return load_object(source, "environment")
