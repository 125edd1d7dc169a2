/** Models and their versions. */
import {models} from "../store.ts";

export function ModelsPage() {
  return (
    <>
      <h1>Models</h1>
      <ul>
        {models.value.map((model) => (
          <li key={model.name}>{model.name}</li>
        ))}
      </ul>
    </>
  );
}
