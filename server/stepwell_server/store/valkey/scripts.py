"""The Lua scripts that Valkey runs atomically. In a Cluster the keys of a script belong to one partition.

A script never stops halfway for lack of memory: the server refuses commands that need memory (SET, MSET, ZADD) at the
first write of a script or not at all, and commands that free memory come first.

In a Cluster keys move one by one to another node. A script runs only where all keys of `KEYS` are. So a script that
reads or writes earlier records has their keys there: without them it could run where a session is, but not they.

A key with a wrong type does not make a script fail either: keys are first read by `pcall`, which then returns a table,
and the session is treated like one with a corrupt record.
"""

from __future__ import annotations

import dataclasses
import hashlib

from stepwell_server.core.quotas import SESSION_BYTES
from stepwell_server.store.fields import CHANGE, NOT_COUNTED
from stepwell_server.store.record import CHANGE_VERSION, HEADER
from stepwell_server.store.valkey.keys import HEAD


@dataclasses.dataclass(frozen=True, slots=True)
class Script:
    """The source, and the digest under which a server knows it after loading."""

    source: str
    sha: bytes


def _script(*parts: str) -> Script:
    source = "\n".join(parts)
    return Script(source, hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest().encode())


def _record_functions() -> str:
    """Return Lua functions that read the header of the record in a session's value, derived from `HEADER`.

    For each unsigned integer field of at most 4 bytes there is a function `NAME_of(value)`. `HEAD_BYTES` is the
    length of everything before the texts; a value may be truncated after that.
    """
    functions = [f"local HEAD_BYTES = {HEAD.size + HEADER.itemsize}"]
    for name, (dtype, offset, *_) in (HEADER.fields or {}).items():
        if dtype.kind == "u" and dtype.itemsize <= 4:  # Lua cannot represent larger ones exactly
            at = HEAD.size + offset + 1
            functions.append(
                f"local function {name}_of(value) return (struct.unpack('<I{dtype.itemsize}', value, {at})) end"
            )
    return "\n".join(functions)


RECORD = (
    _record_functions()
    + """
local MAX_TEXT_BYTES = 255 + 65535
local function model_at(value) return HEAD_BYTES + fingerprint_bytes_of(value) end
"""
)
"""Lua code that reads headers of records."""

_EARLIER = f"""
local function is_change(value) return #value >= HEAD_BYTES and schema_of(value) == {CHANGE_VERSION} end
local function earlier_of(key)
  local tag, id = string.match(key, '^(.-{{%d+}})s:(.*)$')
  return tag .. 'e:' .. id
end
-- Moves the record of a session that a change follows to its earlier records. Returns false if they are lost: nothing
-- can follow, and nothing was written.
local function move(key, earlier)
  local was = call('GET', key)
  if is_change(was) then
    local count = pcall('LLEN', earlier)
    if type(count) ~= 'number' or count == 0 then return false end
  else
    call('DEL', earlier)
  end
  call('RPUSH', earlier, sub(was, {HEAD.size + 1}))
  return true
end
"""

_BYTES = f"""
local NOT_COUNTED = {{{", ".join(f"[{tag}] = true" for tag in sorted(NOT_COUNTED))}}}
-- The counted bytes of a record (`store.counts`), given its value, which may be truncated after the texts, and its
-- fields.
local function bytes_of(value, fields)
  if #value < HEAD_BYTES then return 0 end
  local sum, at = {SESSION_BYTES} + rows_bytes_of(value) + extra_bytes_of(value), 1
  while at + 3 <= #fields do
    local length = struct.unpack('<I2', fields, at + 2)
    local tag = struct.unpack('<I2', fields, at)
    if tag == {CHANGE} and length >= 4 then
      sum = sum + struct.unpack('<I4', fields, at + 4) -- the bytes that a change leaves out
    elseif not NOT_COUNTED[tag] then
      sum = sum + 4 + length
    end
    at = at + 4 + length
  end
  return sum
end
"""

_COMMON = """
local call, pcall, sub, byte = redis.call, redis.pcall, string.sub, string.byte
local function now_ms()
  local t = call('TIME')
  return t[1] * 1000 + math.floor(t[2] / 1000)
end
local function packed(ms) return struct.pack('>I8', ms) end
"""

REPLACE = _script(
    _COMMON,
    RECORD,
    _EARLIER,
    """
-- Replaces records of existing sessions. KEYS: the sessions, then the earlier records of each if there are changes.
-- ARGV: required stamps, new stamps (8 bytes each), sizes of records ('=' and one for all, or '~' and 4 bytes each), the
-- records. Returns the numbers of sessions with other stamps, or without the records before a change.
local follows, stamps, sizes, blob = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local used, conflicts, kept, at, begin = packed(now_ms()), {}, {'MSET'}, 1, 0
local size = byte(sizes) == 61 and tonumber(sub(sizes, 2))
local count = #stamps / 8
for i = 1, count do
  local key = KEYS[i]
  local length = size or struct.unpack('<I4', sizes, 4 * i - 2)
  local has, stamp = pcall('GETRANGE', key, 1, 8), sub(stamps, 8 * i - 7, 8 * i)
  if has == sub(follows, 8 * i - 7, 8 * i) then
    local value = '\\1' .. stamp .. used .. sub(blob, begin + 1, begin + length)
    if is_change(value) and not move(key, KEYS[count + i]) then
      conflicts[#conflicts + 1] = i
    else
      kept[at + 1], kept[at + 2] = key, value
      at = at + 2
    end
  elseif has == stamp then
    call('SETRANGE', key, 9, used) -- a retry: write, so that waiting for the disk includes it
  else
    conflicts[#conflicts + 1] = i
  end
  begin = begin + length
end
if at > 1 then call(unpack(kept)) end
return conflicts
""",
)

MAX_RECOUNTED = 10_000
"""Maximum of sessions in a partition that are recounted: counting blocks the server."""

UNDONE_MS = 3_600_000
"""For this time a late request of an undone attempt creates nothing: no connection delays a request longer."""

COMMIT = _script(
    _COMMON,
    RECORD,
    _EARLIER,
    _BYTES,
    """
-- Creates, changes and ends sessions of one partition. KEYS: ids, counts, mark, the sessions, the earlier records of
-- each. ARGV: a letter for each session, required stamps, new stamps (8 bytes each), records and tombstones, their
-- sizes (4 bytes each), the offset of ids in keys, the lifetime of tombstones (ms), the minimum and maximum idle time
-- of each session that ends (ms, 8 bytes each; empty: no limit). Returns the numbers of sessions that do not match. If
-- the mark is missing, the partition may have been emptied: then no session is created, and the first number is 0.
--   P  put: replace the record with the stamp, or create the session if the tombstone has the stamp; without a stamp,
--      create it if there is neither and the id is not listed; with the highest stamp, create it if the id is listed
--      (it was lost)
--   D  delete the record with the stamp, or without a stamp any record; put the tombstone if one is given
--   U  as D, for a session that an attempt with the stamp may have created: late requests of that attempt create
--      nothing
--   T  put a tombstone if there is no record
--   F  delete a tombstone
--   L  put a tombstone if there is neither and the id is listed
local index, counts = KEYS[1], KEYS[2]
local letters, follows, stamps, blob, sizes = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local id_at, live_ms, least, most = tonumber(ARGV[6]) + 1, tonumber(ARGV[7]), ARGV[8], ARGV[9]
local now = now_ms()
local used, none, lost, conflicts, begin = packed(now), string.rep('\\0', 8), string.rep('\\255', 8), {}, 0
local was_lost = false
local is_marked = not string.find(letters, 'P', 1, true) or call('EXISTS', KEYS[3]) == 1
if not is_marked then conflicts[1] = 0 end

local function model_of(value) -- from the header of the record
  if #value < HEAD_BYTES then return '' end
  local at = model_at(value)
  return sub(value, at + 1, at + model_bytes_of(value))
end
local function rows_of(value)
  if #value < HEAD_BYTES then return 0 end
  return batch_size_of(value)
end
local function add(name, by)
  if name == '' or by == 0 then return end
  local after = pcall('HINCRBY', counts, name, by)
  if type(after) == 'number' and after <= 0 then call('HDEL', counts, name) end
end
local function names_of(id, model)
  local tenant = string.find(id, '\\31', 1, true)
  if not tenant then return {model} end
  return {model, '\\31', '\\31' .. model, sub(id, 1, tenant), sub(id, 1, tenant) .. model}
end
local function rows_name_of(id)
  local tenant = string.find(id, '\\31', 1, true)
  return '\\31\\31' .. (tenant and sub(id, 1, tenant - 1) or '')
end
local function count(id, model, by)
  for _, name in ipairs(names_of(id, model)) do add(name, by) end
end
local function count_size(id, rows, bytes)
  add(rows_name_of(id), rows)
  add('\\31' .. rows_name_of(id), bytes)
end
local function bytes_of_new(value)
  if #value < HEAD_BYTES then return 0 end
  local size = fields_bytes_of(value)
  return bytes_of(value, size > 0 and sub(value, -size) or '')
end
local function bytes_at(key, value)
  if #value < HEAD_BYTES then return 0 end
  local size = fields_bytes_of(value)
  return bytes_of(value, size > 0 and call('GETRANGE', key, -size, -1) or '')
end
-- What a lost session counted for is unknown, so recount all sessions of the partition, unless there are too many.
local function recount()
  if call('ZCARD', index) > MAX_RECOUNTED then return end
  local before, sums = sub(KEYS[4], 1, id_at - 1), {}
  for _, id in ipairs(call('ZRANGE', index, 0, -1)) do
    local value = pcall('GETRANGE', before .. id, 0, HEAD_BYTES - 1)
    if type(value) == 'string' and byte(value) == 1 and #value == HEAD_BYTES then
      local at, length = model_at(value), model_bytes_of(value)
      for _, name in ipairs(names_of(id, call('GETRANGE', before .. id, at, at + length - 1))) do
        sums[name] = (sums[name] or 0) + 1
      end
      local rows_name = rows_name_of(id)
      sums[rows_name] = (sums[rows_name] or 0) + rows_of(value)
      sums['\\31' .. rows_name] = (sums['\\31' .. rows_name] or 0) + bytes_at(before .. id, value)
    end
  end
  call('DEL', counts)
  for name, sum in pairs(sums) do
    if name ~= '' and sum > 0 then call('HSET', counts, name, sum) end
  end
end
-- An undone attempt has a mark with its stamp.
local function mark_of(stamp) return string.match(index, '^.-{%d+}') .. 'u:' .. stamp end
local asked, is_undone, marked
local function was_undone(stamp)
  if stamp ~= asked then asked, is_undone = stamp, call('EXISTS', mark_of(stamp)) == 1 end
  return is_undone
end
local function value_at(key)
  local value = pcall('GETRANGE', key, 0, HEAD_BYTES + MAX_TEXT_BYTES - 1)
  return type(value) == 'string' and value or ''
end

for i = 1, #letters do
  local key, earlier, letter = KEYS[i + 3], KEYS[#letters + i + 3], sub(letters, i, i)
  local follow, stamp = sub(follows, 8 * i - 7, 8 * i), sub(stamps, 8 * i - 7, 8 * i)
  local length = struct.unpack('<I4', sizes, 4 * i - 3)
  local content = sub(blob, begin + 1, begin + length)
  begin = begin + length
  local head = pcall('GETRANGE', key, 0, HEAD_BYTES - 1)
  if type(head) ~= 'string' then head = '?' end
  -- any other kind is a corrupt record
  local kind = #head == 0 and 0 or byte(head) == 2 and 2 or 1
  if kind == 1 and is_change(head) and call('EXISTS', earlier) == 0 then kind = 0 end -- lost, see FETCH
  local has, id = sub(head, 2, 9), sub(key, id_at)
  if letter == 'P' then
    local value = '\\1' .. stamp .. used .. content
    if kind == 1 and has == stamp then
      call('SETRANGE', key, 9, used)
    elseif kind ~= 1 and was_undone(stamp) then
      conflicts[#conflicts + 1] = i
    elseif kind == 0 and is_marked and (follow == none or follow == lost) then
      local is_new = follow == none and call('ZADD', index, 0, id) == 1
      if is_new then
        call('SET', key, value)
        count(id, model_of(value), 1)
        count_size(id, rows_of(value), bytes_of_new(value))
      elseif follow == lost and call('ZSCORE', index, id) then
        call('SET', key, value) -- it is still counted
      else
        conflicts[#conflicts + 1] = i
      end
    elseif kind == 2 and is_marked and has == follow then
      call('ZADD', index, 0, id)
      call('SET', key, value)
      count(id, model_of(value), 1)
      count_size(id, rows_of(value), bytes_of_new(value))
    elseif kind == 1 and has == follow then
      local was = value_at(key)
      local before, after, bytes = model_of(was), model_of(value), bytes_at(key, was)
      if is_change(value) then move(key, earlier) end
      call('SET', key, value)
      if before ~= after then count(id, before, -1) count(id, after, 1) end
      count_size(id, rows_of(value) - rows_of(was), bytes_of_new(value) - bytes)
    else
      conflicts[#conflicts + 1] = i
    end
  elseif letter == 'D' or letter == 'U' then
    if letter == 'U' and marked ~= follow then
      marked = follow
      call('DEL', mark_of(follow)) -- from here on nothing is refused for lack of memory
      call('SET', mark_of(follow), '', 'PX', UNDONE_MS)
    end
    if kind == 1 then
      local least_ms = least == '' and 0 or struct.unpack('>I8', least, 8 * i - 7)
      local age = #head >= 17 and now - struct.unpack('>I8', head, 10) or least_ms
      local is_late = most ~= '' and age > struct.unpack('>I8', most, 8 * i - 7)
      if (follow == none or has == follow) and age >= least_ms and not is_late then
        local was = value_at(key)
        local bytes = bytes_at(key, was)
        call('DEL', key, earlier)
        if length > 0 then call('SET', key, '\\2' .. stamp .. used .. content, 'PX', live_ms) end
        pcall('ZREM', index, id)
        count(id, model_of(was), -1)
        count_size(id, -rows_of(was), -bytes)
      else
        conflicts[#conflicts + 1] = i
      end
    elseif kind == 2 and has == stamp then
      call('SETRANGE', key, 9, used)
    elseif length > 0 or follow ~= none then
      conflicts[#conflicts + 1] = i
    else
      pcall('HSET', counts, '', 0) -- a write, so that waiting for the disk includes everything before it
    end
  elseif letter == 'T' then
    if kind ~= 1 then
      if kind == 0 then call('DEL', earlier) end
      call('SET', key, '\\2' .. stamp .. used .. content, 'PX', live_ms)
      was_lost = pcall('ZREM', index, id) == 1 or was_lost
    end
  elseif letter == 'L' then
    if kind == 0 and call('ZSCORE', index, id) then
      call('DEL', earlier)
      call('SET', key, '\\2' .. stamp .. used .. content, 'PX', live_ms)
      call('ZREM', index, id)
      was_lost = true
    else
      conflicts[#conflicts + 1] = i
    end
  elseif kind == 2 then
    call('DEL', key)
  end
end
if was_lost then recount() end
return conflicts
""".replace("MAX_RECOUNTED", str(MAX_RECOUNTED)).replace("UNDONE_MS", str(UNDONE_MS)),
)

FETCH = _script(
    _COMMON,
    RECORD,
    _EARLIER,
    """
-- Reads sessions. KEYS: the sessions, and possibly the earlier records of each. ARGV: known stamps (8 bytes each; empty:
-- none); '1': write something if a value is not known, '2': always write; the maximum of bytes; the number of sessions;
-- '1': this is a Cluster. Returns the time (ms), then each value, or only its head if its stamp is known. The earlier
-- records that a change needs follow it. There are fewer values than sessions, but at least one, if they exceed the
-- maximum. One byte replaces a value:
--   3  there is none, and the id is listed, or the records before a change are missing: the session was lost
--   4  the key has another type
--   5  there is none, and the mark of the partition is missing: it may have been emptied
--   6  it is a change: in a Cluster it needs the key of the earlier records, too
local count, is_cluster = tonumber(ARGV[4]), ARGV[5] == '1'
local known, fence, room = ARGV[1], ARGV[2], tonumber(ARGV[3])
local found = {now_ms()}
-- Keys of the same partition, and so of the same slot, have the same beginning.
local function of_nothing(key)
  local tag, id = string.match(key, '^(.-{%d+})s:(.*)$')
  if type(pcall('ZSCORE', tag .. 'ids', id)) == 'string' then return '\\3' end
  return pcall('EXISTS', tag .. 'mark') == 0 and '\\5'
end
for i = 1, count do
  local key, earlier, value = KEYS[i], KEYS[count + i]
  if known == '' then
    value = pcall('GET', key)
  else
    value = pcall('GETRANGE', key, 0, 16)
    if value == '' then
      value = false
    elseif type(value) == 'string' and (byte(value) ~= 1 or sub(value, 2, 9) ~= sub(known, 8 * i - 7, 8 * i)) then
      value = call('GET', key)
    end
  end
  if not value then
    value = of_nothing(key)
  elseif type(value) == 'table' then
    value = '\\4'
  elseif is_change(value) and is_cluster and not earlier then
    value = '\\6'
  elseif is_change(value) then
    local records = pcall('LRANGE', earlier or earlier_of(key), 0, -1)
    value = records.err and '\\4' or #records == 0 and (of_nothing(key) or '\\3') or value .. table.concat(records)
  end
  if value and fence ~= '0' and #value >= (fence == '1' and 18 or 17) then
    call('DEL', string.match(key, '^.-{%d+}') .. 'none') -- from here on nothing is refused for lack of memory
    call('SETRANGE', key, 9, sub(value, 10, 17)) -- unchanged: once this is on disk, so is everything written before
    fence = '0'
  end
  found[i + 1] = value
  room = room - (value and #value or 0)
  if room < 0 then break end
end
if fence == '2' then
  local tag = string.match(KEYS[1], '^.-{%d+}')
  call('DEL', tag .. 'none')
  call('SET', tag .. 'fence', '')
end
return found
""",
)

HEADS = _script(
    _COMMON,
    RECORD,
    _EARLIER,
    """
-- Reads headers of records. KEYS: the sessions. ARGV: minimum idle time (ms). Returns the time (ms), then each value
-- without rows and extra; empty if there is no record or it was used recently; one byte, 3, if there is no key, or the
-- records before a change are missing.
local now, idle_ms = now_ms(), tonumber(ARGV[1])
local found = {now}
for i, key in ipairs(KEYS) do
  local value = pcall('GETRANGE', key, 0, HEAD_BYTES - 1)
  if value == '' then
    value = '\\3'
  elseif type(value) == 'table' or byte(value) ~= 1 then
    value = ''
  elseif is_change(value) and pcall('EXISTS', earlier_of(key)) == 0 then
    value = '\\3'
  elseif idle_ms > 0 and #value >= 17 and now - struct.unpack('>I8', value, 10) < idle_ms then
    value = ''
  elseif #value == HEAD_BYTES then
    local texts = fingerprint_bytes_of(value) + model_bytes_of(value)
    local fields = fields_bytes_of(value)
    value = value .. call('GETRANGE', key, HEAD_BYTES, HEAD_BYTES + texts - 1)
    if fields > 0 then value = value .. call('GETRANGE', key, -fields, -1) end
  end
  found[i + 1] = value
end
return found
""",
)

TOUCH = _script(
    _COMMON,
    """
-- Marks sessions as used now, if they have these stamps. KEYS: the sessions. ARGV: stamps (8 bytes each).
local used = packed(now_ms())
for i, key in ipairs(KEYS) do
  local head = pcall('GETRANGE', key, 0, 8)
  if type(head) == 'string' and byte(head) == 1 and sub(head, 2, 9) == sub(ARGV[1], 8 * i - 7, 8 * i) then call('SETRANGE', key, 9, used) end
end
return 0
""",
)

CLAIM = _script(
    _COMMON,
    """
-- Claims a task for one server at a time. KEYS: the claim. ARGV: the claimant, the duration (ms). Returns for how long
-- it has held the claim (ms); -1: another holds it.
local has, now = pcall('GET', KEYS[1]), now_ms()
local since = now
if type(has) == 'string' then
  local at, who = string.match(has, '^(%d+) (.*)$')
  if who ~= ARGV[1] then return -1 end
  since = tonumber(at)
end
call('SET', KEYS[1], string.format('%.0f', since) .. ' ' .. ARGV[1], 'PX', ARGV[2])
return math.max(0, now - since)
""",
)

REPLICAS = _script(
    _COMMON,
    """
-- Writes the description of a server and returns those of all servers. KEYS: the list. ARGV: its id, its description
-- ('': it leaves), limits: number of servers, bytes of an id, bytes of a description, age (ms). Returns ids, ages (ms)
-- and descriptions. Entries that are too old are removed; so are those that no server wrote, and their age is -1.
local key, own, most, expiry = KEYS[1], ARGV[1], tonumber(ARGV[3]), tonumber(ARGV[6])
local count, now, found = pcall('HLEN', key), now_ms(), {}
if type(count) ~= 'number' then return found end
if count > most then call('DEL', key) end -- no server adds so many
local all, left = call('HGETALL', key), 0
for i = 1, #all, 2 do
  local id, value = all[i], all[i + 1]
  local is_sound = #id <= tonumber(ARGV[4]) and #value > 8 and #value <= 8 + tonumber(ARGV[5])
  local age = is_sound and now - struct.unpack('>I8', value) or -expiry
  if age >= expiry or age <= -expiry or id == own then
    call('HDEL', key, id)
    if age <= -expiry then
      found[#found + 1], found[#found + 2], found[#found + 3] = sub(id, 1, tonumber(ARGV[4])), -1, ''
    end
  else
    left = left + 1
    found[#found + 1], found[#found + 2], found[#found + 3] = id, math.max(0, age), sub(value, 9)
  end
end
if ARGV[2] ~= '' and left < most then
  call('HSET', key, own, packed(now) .. ARGV[2])
  found[#found + 1], found[#found + 2], found[#found + 3] = own, 0, ARGV[2]
end
return found
""",
)

DOCUMENTS = _script(
    """
-- Writes documents. KEYS: documents, the fence. ARGV: for each its name, its required value ('': any, '0': absent, '1'
-- and the value) and its new value ('0': absent, '1' and the value). Returns the names of documents that do not match.
-- One that already has its new value was written by an earlier attempt, and is written again.
local call, sub = redis.call, string.sub
local stale = {}
for i = 1, #ARGV, 3 do
  local name, must, new = ARGV[i], ARGV[i + 1], ARGV[i + 2]
  local has = call('HGET', KEYS[1], name)
  has = has and '1' .. has or '0'
  if must ~= '' and has ~= must and has ~= new then
    stale[#stale + 1] = name
  else
    if new == '0' then call('HDEL', KEYS[1], name) else call('HSET', KEYS[1], name, sub(new, 2)) end
  end
end
call('SET', KEYS[2], '')
return stale
""",
)

MAKE = _script(
    """
-- Returns the description of the store, which is created if missing. KEYS: the store. ARGV: names and values of a new
-- one. Returns 1 if it was created, else 0, then names and values.
local made = redis.call('EXISTS', KEYS[1]) == 0 and 1 or 0
if made == 1 then redis.call('HSET', KEYS[1], unpack(ARGV)) end
return {made, redis.call('HGETALL', KEYS[1])}
""",
)

MARK = _script(
    _COMMON,
    """
-- Returns the mark of a partition, which is created if missing. KEYS: its mark, its ids. ARGV: the store's incarnation,
-- the token of the known mark (empty: none), a token for a new one, '1' if there must have been one. The mark is the
-- incarnation, a token, and when the partition was found empty (ms), 0: never.
local has = pcall('GET', KEYS[1])
if type(has) == 'string' then return has end
local token, lost_ms = ARGV[3], 0
if ARGV[4] == '1' then
  if call('EXISTS', KEYS[2]) == 0 then
    lost_ms = now_ms()
  elseif ARGV[2] ~= '' then
    token = ARGV[2] -- only the mark was lost
  end
end
local mark = ARGV[1] .. ' ' .. token .. ' ' .. string.format('%.0f', lost_ms)
call('SET', KEYS[1], mark)
return mark
""",
)

ALL = (REPLACE, COMMIT, FETCH, HEADS, TOUCH, CLAIM, REPLICAS, DOCUMENTS, MAKE, MARK)
