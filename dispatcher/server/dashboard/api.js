// Speaks to the server: with the run's token, which this tab keeps, and with the admin token,
// which only this page's memory keeps.

const TOKEN = "dispatcher-token";
const LONGEST_MS = 15000;

export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export class Away extends Error {}

// A server that wants no token says so in the page; it wants no admin token either.
export const wantsToken = () => document.body.dataset.token === "wanted";
let adminToken = wantsToken() ? null : "";

export const hasToken = () => sessionStorage.getItem(TOKEN) !== null;
export const keepToken = (token) => sessionStorage.setItem(TOKEN, token);
export const dropToken = () => sessionStorage.removeItem(TOKEN);
export const hasAdminToken = () => adminToken !== null;
export const keepAdminToken = (token) => { adminToken = token; };
export const dropAdminToken = () => { adminToken = null; };

async function call(path, token, options = {}) {
  const headers = { ...(options.headers || {}) };
  if (token) headers.Authorization = `Bearer ${token}`;
  let reply, text;
  try {
    const signal = AbortSignal.timeout(LONGEST_MS);
    reply = await fetch(path, { ...options, headers, signal, cache: "no-store", mode: "same-origin" });
    text = await reply.text();
  } catch (error) {
    throw new Away(String(error));
  }
  let said;
  try {
    said = JSON.parse(text);
  } catch (error) {
    // Somebody else has the port by now, or a proxy answers for a server that is gone.
    throw new Away(`the reply is not JSON (${reply.status})`);
  }
  if (reply.ok) return said;
  if (reply.status === 502 || reply.status === 503 || reply.status === 504) {
    throw new Away(said.message || `status ${reply.status}`);
  }
  throw new Refused(reply.status, said.message || `status ${reply.status}`);
}

export const get = (path) => call(path, sessionStorage.getItem(TOKEN));

export const change = (path, body) =>
  call(path, adminToken || sessionStorage.getItem(TOKEN), {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
  });
