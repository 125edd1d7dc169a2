import {Plane} from "../state/index.tsx";

export function PlanePage() {
  return (
    <>
      <h1>Plane</h1>
      <Plane />
    </>
  );
}
