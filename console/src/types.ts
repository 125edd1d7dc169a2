/** The messages of proto/stepwell/v1 that the console reads, as protobuf writes them in JSON: numbers of 64 bits are
 * strings, and fields that are 0, false or empty are absent. */

export interface Tensor {
  name?: string;
  dtype?: string;
  shape?: string[];
  /** Base64 of the elements: little-endian, row-major. */
  data?: string;
  values?: (number | string)[];
}

export interface TensorSpec {
  name: string;
  dtype: string;
  shape?: string[];
  temporal?: boolean;
}

export interface ModelVersion {
  version: string;
  state: string;
  reason?: string;
  fingerprint?: string;
  is_default?: boolean;
  labels?: string[];
  sessions?: string;
  path?: string;
  loaded_time?: string;
}

export interface Proof {
  compared_steps?: number;
  unproven?: string;
  compared_share?: number;
  rows?: string;
}

export interface Model {
  name: string;
  fingerprint: string;
  inputs: TensorSpec[];
  outputs: TensorSpec[];
  state: TensorSpec[];
  executor: string;
  executor_reason?: string;
  state_row_bytes?: string;
  sessions?: string;
  proof?: Proof;
  provenance?: {source?: string; parameters?: string; layers?: {name: string; kind: string; output?: string}[]};
  version: string;
  versions?: ModelVersion[];
  structure?: string;
}

export interface ServerIdentity {
  front?: string;
  id?: string;
  role?: string;
  metrics_address?: string;
  address?: string;
}

export interface Session {
  session_id: string;
  model: string;
  model_fingerprint?: string;
  batch_size?: number;
  revision?: string;
  position?: string;
  created_time?: string;
  last_used_time?: string;
  resident?: boolean;
  tenant?: string;
  model_version?: string;
  model_version_pinned?: boolean;
  uid?: string;
  max_idle?: string;
}

export interface ErrorMessage {
  code?: number;
  message?: string;
  reason?: string;
}

export type SessionEventKind =
  | "SESSION_EVENT_KIND_PRESENT"
  | "SESSION_EVENT_KIND_STEP"
  | "SESSION_EVENT_KIND_RESET"
  | "SESSION_EVENT_KIND_ENDED";

export interface SessionEvent {
  session_id: string;
  kind: SessionEventKind;
  revision?: string;
  position?: string;
  time?: string;
  /** Those of the last time step, each (rows, features...). */
  inputs?: Tensor[];
  outputs?: Tensor[];
  /** State after the change, each (batch_size, ...). */
  states?: Tensor[];
  time_steps?: number;
  rows?: number[];
  skipped_revisions?: string;
  dropped_revisions?: string;
  from_store?: boolean;
  model?: string;
  model_version?: string;
  error?: ErrorMessage;
  uid?: string;
}

export interface StageLatency {
  stage: string;
  p50_seconds?: number;
  p99_seconds?: number;
}

export interface ServerActivity {
  version?: string;
  front?: string;
  id?: string;
  uptime_seconds?: number;
  memory_bytes?: string;
  max_memory_bytes?: string;
  cores?: number;
  connections?: string;
  streams?: string;
  store?: string;
  store_id?: string;
  store_ready?: boolean;
  row_steps_per_second?: number;
  latencies?: StageLatency[];
  errors_per_second?: number;
  sessions?: string;
  resident_sessions?: string;
  resident_rows?: string;
  queued_rows?: string;
  watched_sessions?: string;
  replicas?: ReplicaActivity[];
}

export type ReplicaState =
  | "REPLICA_STATE_READY"
  | "REPLICA_STATE_NOT_READY"
  | "REPLICA_STATE_STOPPING"
  | "REPLICA_STATE_MISSING";

/** One of the servers that share the store, as it last reported itself. */
export interface ReplicaActivity {
  id: string;
  host?: string;
  address?: string;
  http_address?: string;
  version?: string;
  started_time?: string;
  state?: ReplicaState;
  last_seen_time?: string;
  resident_sessions?: string;
}

export interface ModelActivity {
  name: string;
  version?: string;
  versions?: ModelVersion[];
  executor?: string;
  row_steps_per_second?: number;
  passes_per_second?: number;
  rows_per_pass?: number;
  busy?: number;
  latencies?: StageLatency[];
  sessions?: string;
  resident_sessions?: string;
  resident_rows?: string;
  max_resident_rows?: string;
  resident_bytes?: string;
  paged_in_per_second?: number;
  paged_out_per_second?: number;
  queued_rows?: string;
}

/** A response of WatchServer. `server` is absent unless the caller is an admin or the server knows no callers. */
export interface ServerEvent {
  time?: string;
  interval_seconds?: number;
  ready?: boolean;
  problems?: Record<string, string>;
  warnings?: Record<string, string>;
  server?: ServerActivity;
  models?: ModelActivity[];
  methods?: {method: string; calls_per_second?: number; messages_per_second?: number; p50_seconds?: number; p99_seconds?: number}[];
  errors?: {model?: string; reason: string; per_second?: number}[];
  tenants?: {tenant: string; row_steps_per_second?: number; sessions?: string}[];
  slow_sessions?: {session_id: string; model?: string; seconds?: number; age_seconds?: number; tenant?: string}[];
}
