"""A session in ten lines. The server: `make demo` trains the model, `stepwell serve temperature=out/temperature.keras`."""

import numpy as np

import stepwell

with stepwell.connect() as client, client.open_session("temperature") as session:  # 127.0.0.1:50051
    for hour, celsius in enumerate([6.1, 5.6, 5.0, 4.4, 3.9, 3.9, 5.6, 8.3, 10.0]):
        angle = 2 * np.pi * (6 + hour) / 24
        forecast = session.step([[celsius, np.sin(angle), np.cos(angle)]])
        print(
            f"hour {session.position}: {celsius:4.1f} °C now, {np.asarray(forecast).item():4.1f} °C in an hour"
        )
    session.get_state().save("user-42.safetensors")  # a state is a value: load it, set it, here or elsewhere
