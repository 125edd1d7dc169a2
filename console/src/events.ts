/** Reads server-sent events. No DOM. */

export interface ServerSentEvent {
  name: string;
  data: string;
}

/** Splits a stream of text into events. Comments are dropped. */
export class EventParser {
  private rest = "";

  /** Return the events that this part of the stream completes. */
  push(part: string): ServerSentEvent[] {
    const blocks = (this.rest + part).split("\n\n");
    this.rest = blocks.pop() ?? "";
    const found: ServerSentEvent[] = [];
    for (const block of blocks) {
      const event = {name: "message", data: ""};
      for (const line of block.split("\n")) {
        if (line.startsWith("event: ")) event.name = line.slice(7);
        else if (line.startsWith("data: ")) event.data += line.slice(6);
      }
      if (event.data) found.push(event);
    }
    return found;
  }
}
